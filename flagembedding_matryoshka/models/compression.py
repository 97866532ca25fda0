"""Width: neighbouring passage tokens merged into one, weighted by the last token's attention.

Ratio 2 on a sequence of 2 query, 5 passage and 1 prompt tokens, q q a b c d e p, whose passage tokens are worth 1 to 5
and weigh the same; the last group may be short:

>>> packed = PackedBatch(*torch.tensor([[2], [5], [1]]), torch.device("cpu"))
>>> tokens = torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 9.0])[None, :, None]
>>> row, compressed = compress(tokens, None, packed, ratio=2)
>>> row.flatten().tolist()
[0.0, 0.0, 1.5, 3.5, 5.0, 9.0]
>>> compressed.passage_lengths.tolist(), compressed.offsets.tolist()
([3], [0, 1, 2, 3, 4, 5])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flagembedding_matryoshka.models.batch import PackedBatch

UNDERFLOW = 1e-30
"""A group with less attention than this counts as underflowed: the gradient of 1 / it would overflow float32."""


class Slots(NamedTuple):
    """Where the tokens of a row go.

    Attributes:
        places: (total_tokens,) int64: each token's place in the compressed row.
        in_passage: (total_tokens,) bool: whether it is a passage token.
    """

    places: Tensor
    in_passage: Tensor


@dataclass(frozen=True)
class SlotsOf:
    """The indices of a compression.

    Attributes:
        ratio: number of tokens in a group.
    """

    ratio: int

    def __call__(self, packed: PackedBatch) -> Slots:
        """Return the slots of a batch, on the CPU."""

        def per_token(values: Tensor) -> Tensor:
            return values.repeat_interleave(packed.lengths)

        compressed = packed.compressed(self.ratio)
        offset = packed.offsets
        in_query = offset < per_token(packed.query_lengths)
        in_prompt = offset >= per_token(packed.query_lengths + packed.passage_lengths)
        group = per_token(packed.query_lengths) + (offset - per_token(packed.query_lengths)).div(
            self.ratio, rounding_mode="floor"
        )
        after_groups = offset - per_token(packed.passage_lengths - compressed.passage_lengths)
        slot = torch.where(in_query, offset, torch.where(in_prompt, after_groups, group))
        return Slots(slot + per_token(compressed.cu_seqlens[:-1]), ~in_query & ~in_prompt)


def compress(
    hidden_states: Tensor, attention_row: Tensor | None, packed: PackedBatch, ratio: int
) -> tuple[Tensor, PackedBatch]:
    """Merge groups of `ratio` neighbouring passage tokens (paper: arXiv 2501.16302, width compression).

    A group of states h becomes Σ w·h. The weights w are the group's part of the attention row over its sum. They are
    equal if there is no attention row, or if all of the group's part underflowed. Query and prompt tokens stay.

    Args:
        hidden_states: (1, total_tokens, hidden).
        attention_row: (total_tokens,) float32, see [`~flagembedding_matryoshka.models.attention.last_token_row`]; None
            weighs all tokens equally.
        ratio: number of tokens in a group, at least 2.

    Returns:
        (1, fewer_tokens, hidden) in the dtype of `hidden_states`, and where the sequences lie in it.
    """
    compressed = packed.compressed(ratio)
    slots, in_passage = packed.indices(SlotsOf(ratio))
    total = int(compressed.cu_seqlens[-1])

    row = torch.ones(len(slots), device=packed.device)
    if attention_row is not None:
        row = torch.where(in_passage, attention_row, row)
    group_sum = row.new_zeros(total).index_add(0, slots, row)[slots]
    group_size = row.new_zeros(total).index_add(0, slots, torch.ones_like(row))[slots]
    underflow = group_sum < UNDERFLOW
    weights = torch.where(underflow, 1 / group_size, row / group_sum.masked_fill(underflow, 1.0))

    merged = weights.new_zeros(total, hidden_states.shape[-1]).index_add(0, slots, hidden_states[0] * weights[:, None])
    return merged.to(hidden_states.dtype)[None], compressed
