"""Linear layers whose rows do not depend on the number of other rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flagembedding_matryoshka.models.onednn import OneDnnLinear

ROWS = 512
"""Rows of a tile; the last tile of a batch is padded. With weights of 512 × 512, 512 rows reached 0.83 of the matrix
peak and 1,024 rows 0.96, on two cores in bfloat16."""


class TiledLinear(OneDnnLinear):
    """A linear layer that always multiplies `ROWS` rows at a time.

    The number of rows determines the kernel of a product, and so the order of its sums. In bfloat16 the result of a row
    would depend on it.
    """

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]  # no block of `OneDnnMlp` has one
        """(…, in_features) to (…, out_features)."""
        rows = input.flatten(0, -2)
        tiles = [super(TiledLinear, self).forward(_filled(tile)) for tile in rows.split(ROWS)]
        return torch.cat(tiles)[: len(rows)].unflatten(0, input.shape[:-1])


def tile_linears(module: nn.Module) -> None:
    """Turn all linear layers of a module into tiled ones, in place."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = TiledLinear


def _filled(tile: Tensor) -> Tensor:
    """Pad a tile with zeros to `ROWS` rows."""
    return tile if len(tile) == ROWS else F.pad(tile, (0, 0, 0, ROWS - len(tile)))
