"""The ragged batch: all sequences' tokens in one row, without padding.

Three sequences of 4, 2 and 3 tokens, each made of query part, passage and prompt part:

    row          q q p P | q P | q p P          (1, 9, hidden)
    cu_seqlens   0       4     6       9
    positions    0 1 2 3   0 1   0 1 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Where the sequences, and their parts, lie in a packed row of hidden states (1, total_tokens, hidden).

    The three lengths are (batch,) int64 tensors on the CPU, where shapes are decided without waiting for a device.

    Attributes:
        query_lengths: tokens up to and with the separator behind the query.
        passage_lengths: tokens that compression may merge.
        prompt_lengths: tokens behind the passage.
        device: where the index tensors below are needed.
    """

    query_lengths: Tensor
    passage_lengths: Tensor
    prompt_lengths: Tensor
    device: torch.device

    @cached_property
    def lengths(self) -> Tensor:
        """(batch,) int64, CPU: tokens per sequence."""
        return self.query_lengths + self.passage_lengths + self.prompt_lengths

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(batch + 1,) int64, CPU: where each sequence starts in the row; the last value is the row's length."""
        return torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])

    @cached_property
    def segments(self) -> list[tuple[int, int]]:
        """(start, end) of each sequence in the row."""
        return list(pairwise(self.cu_seqlens.tolist()))

    @property
    def max_seqlen(self) -> int:
        """Length of the longest sequence."""
        return int(self.lengths.max())

    @cached_property
    def sequence_ids(self) -> Tensor:
        """(total_tokens,) int64, on `device`: which sequence each token belongs to."""
        return torch.repeat_interleave(self.lengths).to(self.device)

    @cached_property
    def offsets(self) -> Tensor:
        """(total_tokens,) int64, CPU: position of each token in its sequence."""
        return torch.arange(int(self.cu_seqlens[-1])) - self.cu_seqlens[:-1].repeat_interleave(self.lengths)

    @cached_property
    def position_ids(self) -> Tensor:
        """(1, total_tokens) int64, on `device`: `offsets` as the rotary embedding wants them."""
        return self.offsets[None].to(self.device)

    @cached_property
    def last_tokens(self) -> Tensor:
        """(batch,) int64, on `device`: index of each sequence's last token in the row."""
        return (self.cu_seqlens[1:] - 1).to(self.device)

    def select(self, sequences: Sequence[int]) -> PackedBatch:
        """The lengths of some sequences, in the order given."""
        index = torch.tensor(sequences, dtype=torch.long)
        return PackedBatch(
            self.query_lengths[index], self.passage_lengths[index], self.prompt_lengths[index], self.device
        )

    def pad(self, row: Tensor) -> Tensor:
        """A packed row (total_tokens, hidden) as (batch, max_seqlen, hidden), right-padded with zeros."""
        padded = row.new_zeros(len(self.lengths), self.max_seqlen, row.shape[-1])
        return padded.index_put((self.sequence_ids, self.position_ids[0]), row)

    def padded_attention_mask(self) -> Tensor:
        """(batch, max_seqlen) int64, on `device`: 1 on tokens, 0 on padding."""
        return (torch.arange(self.max_seqlen) < self.lengths[:, None]).long().to(self.device)


def pack(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    query_lengths: Sequence[int] | Tensor | None = None,
    prompt_lengths: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, PackedBatch]:
    """Drop the padding of an ordinary batch. Right- and left-padded rows are both understood.

    Args:
        input_ids: (batch, length) int64.
        attention_mask: (batch, length), non-zero on tokens; None means no padding.
        query_lengths, prompt_lengths: (batch,) lengths of the parts; without them no passage is known.

    Returns:
        token ids (1, total_tokens) and where the sequences lie among them.

    Raises:
        ValueError: on rows that are empty or padded in the middle, and on part lengths that do not fit.
    """
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be (batch, length) with at least one token, got {tuple(input_ids.shape)}.")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)} differ in shape."
        )
    mask = attention_mask.cpu() != 0
    lengths = mask.sum(1)
    _refuse_broken_rows(mask, lengths)

    if query_lengths is None or prompt_lengths is None:
        if query_lengths is not None or prompt_lengths is not None:
            raise ValueError("query_lengths and prompt_lengths go together: give both or neither.")
        query, prompt = lengths, torch.zeros_like(lengths)
    else:
        query = _part_lengths("query_lengths", query_lengths, len(lengths))
        prompt = _part_lengths("prompt_lengths", prompt_lengths, len(lengths))
    passage = lengths - query - prompt
    if (passage < 0).any():
        row = int(torch.nonzero(passage < 0)[0])
        raise ValueError(
            f"row {row} has {int(lengths[row])} tokens, fewer than query_lengths {int(query[row])} + "
            f"prompt_lengths {int(prompt[row])}."
        )
    packed = PackedBatch(query, passage, prompt, input_ids.device)
    return input_ids[mask.to(input_ids.device)][None], packed


def _refuse_broken_rows(mask: Tensor, lengths: Tensor) -> None:
    if (lengths == 0).any():
        raise ValueError(f"row {int(torch.nonzero(lengths == 0)[0])} of the batch has no token.")
    # A row that is one run of tokens changes from padding to token, or back, once on each side at most.
    starts = mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if (starts > 1).any():
        raise ValueError(f"row {int(torch.nonzero(starts > 1)[0])} of attention_mask has padding between tokens.")


def _part_lengths(name: str, lengths: Sequence[int] | Tensor, batch_size: int) -> Tensor:
    values = torch.as_tensor(lengths).cpu().long()
    if values.shape != (batch_size,):
        raise ValueError(f"{name} must hold one length for each of the {batch_size} rows, got {tuple(values.shape)}.")
    if (values < 0).any():
        raise ValueError(f"{name} must not be negative, got {int(values.min())} in row {int(values.argmin())}.")
    return values
