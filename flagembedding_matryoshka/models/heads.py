"""Scores from the last token's state."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from flagembedding_matryoshka.models.invariance import RowwiseLinear


class CostWiseHead(nn.Module):
    """The score of one exit: a bias-free projection of the last token's normalised state, in the head's own format.

    A model keeps its heads in float32: in bfloat16 a hundred candidates have a few dozen different scores. A state has
    the same score whatever others there are.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_head = RowwiseLinear(hidden_size, 1, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """(batch, hidden) to (batch,) float32."""
        with maybe_autocast(states.device.type, enabled=False):
            return self.linear_head(states.to(self.linear_head.weight.dtype)).squeeze(-1).float()
