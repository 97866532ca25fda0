"""Products whose rows do not depend on how many others there are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 512
"""Of a tile; a batch's last one is filled up. By 512 × 512 weights 512 rows ran at 0.83 of the matrix peak and 1,024 at
0.96, on two cores in bfloat16."""


class TiledLinear(nn.Linear):
    """A linear layer that multiplies as many rows at a time, whatever it is given.

    The kernel of a product, and so the order in which it adds, is chosen by the number of rows: in bfloat16 the same
    row then comes out otherwise among others.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(…, in_features) to (…, out_features)."""
        rows = input.flatten(0, -2)
        tiles = [super(TiledLinear, self).forward(_filled(tile)) for tile in rows.split(ROWS)]
        return torch.cat(tiles)[: len(rows)].unflatten(0, input.shape[:-1])


class RowwiseLinear(nn.Linear):
    """A linear layer of one output, each of which is summed by itself; it has no bias.

    Where gradients are wanted it is a product as any other: learning sums over all rows in any case.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(…, in_features) to (…, 1)."""
        if torch.is_grad_enabled():
            return super().forward(input)
        return torch.linalg.vecdot(input, self.weight).unsqueeze(-1)


def tile_linears(module: nn.Module) -> None:
    """Make all linear layers in a module tiled ones, in place."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = TiledLinear


def _filled(tile: Tensor) -> Tensor:
    """Rows, and zeros up to `ROWS`."""
    return tile if len(tile) == ROWS else F.pad(tile, (0, 0, 0, ROWS - len(tile)))
