"""The ragged batch: all sequences' tokens in one row, without padding.

Three sequences of 4, 2 and 3 tokens, each made of query part, passage and prompt part, in a row q q p P | q P | q p P:

>>> lengths = torch.tensor([[2, 1, 1], [1, 0, 1], [1, 1, 1]]).T
>>> packed = PackedBatch(*lengths, torch.device("cpu"))
>>> packed.cu_seqlens.tolist(), packed.position_ids.tolist()
([0, 4, 6, 9], [[0, 1, 2, 3, 0, 1, 0, 1, 2]])

Sequences that begin with the same query part may share it: it is then a segment of its own, which stands in front of
theirs and which they attend to. The first and the last of these have a query of 2 tokens in common: q q | p P | p p P

>>> lengths = torch.tensor([[2, 0, 0], [0, 1, 1], [0, 2, 1]]).T
>>> packed = PackedBatch(*lengths, torch.device("cpu"), prefixes=torch.tensor([-1, 0, 0]))
>>> packed.cu_seqlens.tolist(), packed.position_ids.tolist()
([0, 2, 4, 7], [[0, 1, 2, 3, 2, 3, 4]])
>>> packed.sequence_lengths.tolist(), packed.last_tokens.tolist()
([4, 5], [3, 6])
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 128
"""Tokens of a block of `PackedBatch.context_blocks`."""


class PackedBatch:
    """Where the segments, and their parts, lie in a packed row of hidden states (1, total_tokens, hidden).

    A segment is a whole sequence, the query part that several sequences share, or the rest of such a sequence. The
    lengths and `prefixes` are (segments,) int64 tensors on the CPU, where shapes are decided without waiting for a
    device. A batch does not change.

    It is no dataclass: FSDP2 rebuilds these before each layer when it casts arguments, and each copy would compute and
    copy all indices again.

    Args:
        query_lengths: tokens up to and with the separator after the query.
        passage_lengths: tokens that compression may merge.
        prompt_lengths: tokens after the passage.
        device: the device of the index tensors below.
        prefixes: the segment that each one continues, -1 for segments that continue none; None if no query is shared.

    Attributes:
        lengths: (segments,) int64, CPU: tokens of each segment.
        prefix_lengths: (segments,) int64, CPU: tokens of the segment that each one continues, or 0.
        context_lengths: (segments,) int64, CPU: tokens that the last token of each segment attends to.
        cu_seqlens: (segments + 1,) int64, CPU: the start of each segment in the row, and at the end the row's length.
        sequences: (sequences,) int64, CPU: the segments that end a sequence, which are all but the shared ones.
        sequence_lengths: (sequences,) int64, CPU: tokens of each sequence, including a shared segment.
    """

    def __init__(
        self,
        query_lengths: Tensor,
        passage_lengths: Tensor,
        prompt_lengths: Tensor,
        device: torch.device,
        prefixes: Tensor | None = None,
    ) -> None:
        self.query_lengths, self.passage_lengths, self.prompt_lengths = query_lengths, passage_lengths, prompt_lengths
        self.device, self.prefixes = device, prefixes
        self.lengths = lengths = query_lengths + passage_lengths + prompt_lengths
        self.prefix_lengths = torch.zeros_like(lengths)
        continued = torch.zeros(len(lengths), dtype=torch.bool)
        if prefixes is not None:
            self.prefix_lengths = torch.where(prefixes < 0, 0, lengths[prefixes])
            continued[prefixes[prefixes >= 0]] = True
        self.context_lengths = self.prefix_lengths + lengths
        self.cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        self.sequences = torch.nonzero(~continued)[:, 0]
        self.sequence_lengths = self.context_lengths[self.sequences]

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch with its index tensors on `device`."""
        return PackedBatch(self.query_lengths, self.passage_lengths, self.prompt_lengths, device, self.prefixes)

    def with_passages(self, lengths: Tensor) -> PackedBatch:
        """Return the batch with passages of these (segments,) int64 lengths."""
        return PackedBatch(self.query_lengths, lengths, self.prompt_lengths, self.device, self.prefixes)

    @cached_property
    def segments(self) -> list[tuple[int, int]]:
        """(start, end) of each segment in the row."""
        return list(pairwise(self.cu_seqlens.tolist()))

    @property
    def max_seqlen(self) -> int:
        """Length of the longest sequence."""
        return int(self.sequence_lengths.max())

    @cached_property
    def segment_ids(self) -> Tensor:
        """(total_tokens,) int64, on `device`: which segment each token belongs to."""
        return on_device(torch.repeat_interleave(self.lengths), self.device)

    @cached_property
    def offsets(self) -> Tensor:
        """(total_tokens,) int64, CPU: position of each token in its segment."""
        return _ranges(self.lengths)

    @cached_property
    def position_ids(self) -> Tensor:
        """(1, total_tokens) int64, on `device`: position of each token in its sequence."""
        positions = self.offsets + self.prefix_lengths.repeat_interleave(self.lengths)
        return on_device(positions[None], self.device)

    @cached_property
    def segment_ends(self) -> Tensor:
        """(segments,) int64, on `device`: index of each segment's last token in the row."""
        return on_device(self.cu_seqlens[1:] - 1, self.device)

    @cached_property
    def last_tokens(self) -> Tensor:
        """(sequences,) int64, on `device`: index of each sequence's last token in the row."""
        return on_device((self.cu_seqlens[1:] - 1)[self.sequences], self.device)

    @cached_property
    def context_tokens(self) -> Tensor:
        """(sum of context_lengths,) int64, on `device`: index of these tokens in the row, segment after segment."""
        starts = self.cu_seqlens[:-1]
        prefix_starts = starts if self.prefixes is None else starts[self.prefixes]
        lengths = torch.stack([self.prefix_lengths, self.lengths], dim=1).flatten()
        firsts = torch.stack([prefix_starts, starts], dim=1).flatten()
        return on_device(_ranges(lengths) + firsts.repeat_interleave(lengths), self.device)

    @cached_property
    def context_segments(self) -> Tensor:
        """(sum of context_lengths,) int64, on `device`: whose context each of `context_tokens` belongs to."""
        return on_device(torch.repeat_interleave(self.context_lengths), self.device)

    @cached_property
    def behind_in_context(self) -> Tensor:
        """(sum of context_lengths,) int64, CPU: tokens of its context behind each of `context_tokens`."""
        return self.context_lengths.repeat_interleave(self.context_lengths) - 1 - _ranges(self.context_lengths)

    @cached_property
    def own_in_context(self) -> Tensor:
        """(total_tokens,) int64, on `device`: where each token of the row stands among `context_tokens`."""
        firsts = self.context_lengths.cumsum(0) - self.lengths
        return on_device(self.offsets + firsts.repeat_interleave(self.lengths), self.device)

    @cached_property
    def cu_seqlens_q(self) -> Tensor:
        """(segments + 1,) int32, on `device`: `cu_seqlens`, in flash attention's form."""
        return on_device(self.cu_seqlens.int(), self.device)

    @cached_property
    def segment_numbers(self) -> Tensor:
        """(segments + 1,) int32, on `device`: `cu_seqlens_q` of segments of one token each."""
        return torch.arange(len(self.lengths) + 1, dtype=torch.int32, device=self.device)

    @cached_property
    def cu_seqlens_k(self) -> Tensor:
        """(segments + 1,) int32, on `device`: where each segment's context starts in `context_tokens`."""
        starts = torch.cat([self.lengths.new_zeros(1), self.context_lengths.cumsum(0)])
        return on_device(starts.int(), self.device)

    @cached_property
    def context_groups(self) -> tuple[list[Tensor], Tensor]:
        """The segments' contexts as rectangles, those of similar length together, for kernels that want a batch.

        Returns:
            a (segments, width) int64 tensor for each group, on `device`: index of each token in the row, where a
            shorter context repeats its last one, and none has less than half of the group's width; and
            (total_tokens,) int64, on `device`: where each token of the row stands in all rectangles, flattened.
        """
        order = self.context_lengths.argsort(descending=True, stable=True)
        ends = self.context_lengths.cumsum(0) - 1
        groups: list[Tensor] = []
        firsts = torch.empty_like(self.lengths)
        size = 0
        while len(order):
            lengths = self.context_lengths[order]
            width = int(lengths[0])
            group = order[: int((2 * lengths >= width).sum())]
            order = order[len(group) :]
            begins = ends[group] + 1 - self.context_lengths[group]
            places = torch.minimum(begins[:, None] + torch.arange(width), ends[group][:, None])
            groups.append(self.context_tokens[on_device(places, self.device)])
            firsts[group] = size + torch.arange(len(group)) * width + self.prefix_lengths[group]
            size += len(group) * width
        own = self.offsets + firsts.repeat_interleave(self.lengths)
        return groups, on_device(own, self.device)

    @cached_property
    def prefix_ids_of_segments(self) -> Tensor:
        """(segments,) int64, CPU: the segment that each segment continues, or its own number."""
        own = torch.arange(len(self.lengths))
        return own if self.prefixes is None else torch.where(self.prefixes < 0, own, self.prefixes)

    @cached_property
    def prefix_ids(self) -> Tensor:
        """(total_tokens,) int64, on `device`: for each token, the segment that its segment continues, or its own
        segment."""
        return on_device(self.prefix_ids_of_segments.repeat_interleave(self.lengths), self.device)

    @cached_property
    def context_blocks(self) -> tuple[Tensor, Tensor]:
        """Which blocks of the row, of `BLOCK` tokens each, hold context of which, for kernels that skip the others.

        Returns:
            (blocks,) int32, how many blocks each one attends to, and (blocks, blocks) int32, which these are, first
            the earliest, and 0 behind them; on `device`.
        """
        firsts, lasts = self.cu_seqlens[:-1] // BLOCK, (self.cu_seqlens[1:] - 1) // BLOCK
        spans = lasts - firsts + 1
        segments = torch.repeat_interleave(spans)
        rows = firsts[segments] + _ranges(spans)
        # +1 where a segment's context begins to be seen from a row, -1 behind its end
        count = int(lasts[-1]) + 1
        edges = torch.zeros(count, count + 1, dtype=torch.int32)
        one = torch.ones_like(rows, dtype=torch.int32)
        edges.index_put_((rows, firsts[segments]), one, accumulate=True)
        edges.index_put_((rows, rows + 1), -one, accumulate=True)
        if self.prefixes is not None:
            continued = self.prefixes[segments] >= 0
            rows, one, prefixes = rows[continued], one[continued], self.prefixes[segments][continued]
            edges.index_put_((rows, firsts[prefixes]), one, accumulate=True)
            edges.index_put_((rows, lasts[prefixes] + 1), -one, accumulate=True)
        seen = edges.cumsum(1)[:, :-1] > 0
        counts = seen.sum(1)
        rows, columns = seen.nonzero().unbind(1)
        blocks = torch.zeros(count, count, dtype=torch.int32)
        blocks[rows, _ranges(counts)] = columns.int()
        return on_device(counts.int(), self.device), on_device(blocks, self.device)

    def select(self, sequences: Sequence[int]) -> tuple[PackedBatch, Tensor]:
        """Some sequences, in the order given, with what they share.

        Returns:
            where they lie in a row of their own, and the (tokens,) int64 of this row, on `device`, that make it up.
        """
        chosen = self.sequences[torch.tensor(sequences, dtype=torch.long)]
        prefixes = None
        if self.prefixes is not None:
            shared = [segment for segment in dict.fromkeys(self.prefixes[chosen].tolist()) if segment >= 0]
            place = torch.full((len(self.lengths) + 1,), -1)
            place[shared] = torch.arange(len(shared))
            prefixes = torch.cat([torch.full((len(shared),), -1), place[self.prefixes[chosen]]])
            chosen = torch.cat([torch.tensor(shared, dtype=torch.long), chosen])
        selected = PackedBatch(
            self.query_lengths[chosen],
            self.passage_lengths[chosen],
            self.prompt_lengths[chosen],
            self.device,
            prefixes,
        )
        tokens = selected.offsets + self.cu_seqlens[chosen].repeat_interleave(selected.lengths)
        return selected, on_device(tokens, self.device)

    @classmethod
    def concat(cls, batches: Sequence[PackedBatch]) -> PackedBatch:
        """The segments of several batches in one row, batch after batch. Batches keep their shared segments.

        >>> lengths = torch.tensor([[2, 0], [0, 1], [0, 1]])
        >>> one = PackedBatch(*lengths, torch.device("cpu"), prefixes=torch.tensor([-1, 0]))
        >>> PackedBatch.concat([one, one]).prefixes.tolist()
        [-1, 0, -1, 2]
        """
        prefixes = None
        if any(batch.prefixes is not None for batch in batches):
            before, shifted = 0, []
            for batch in batches:
                own = torch.full_like(batch.lengths, -1) if batch.prefixes is None else batch.prefixes
                shifted.append(torch.where(own < 0, own, own + before))
                before += len(own)
            prefixes = torch.cat(shifted)
        return cls(
            torch.cat([batch.query_lengths for batch in batches]),
            torch.cat([batch.passage_lengths for batch in batches]),
            torch.cat([batch.prompt_lengths for batch in batches]),
            batches[0].device,
            prefixes,
        )

    @cached_property
    def shares_passages(self) -> bool:
        """Whether a passage is in a segment that sequences share."""
        if self.prefixes is None:
            return False
        return bool(self.passage_lengths[self.prefixes[self.prefixes >= 0]].any())

    def apart(self) -> tuple[PackedBatch, Tensor]:
        """The same sequences, none of which shares a segment.

        Returns:
            the sequences in a row of their own, and the (tokens,) int64 of this row, on `device`, that make it up.
        """
        chosen = self.sequences
        continued = self.prefix_ids_of_segments[chosen]
        is_continued = (continued != chosen).long()
        query, passage, prompt = (
            part[chosen] + part[continued] * is_continued
            for part in (self.query_lengths, self.passage_lengths, self.prompt_lengths)
        )
        ends_sequence = torch.zeros(len(self.lengths), dtype=torch.bool)
        ends_sequence[chosen] = True
        kept = on_device(ends_sequence.repeat_interleave(self.context_lengths), self.device)
        return PackedBatch(query, passage, prompt, self.device), self.context_tokens[kept]

    def pad(self, row: Tensor) -> Tensor:
        """A packed row (total_tokens, hidden) as (sequences, max_seqlen, hidden), right-padded with zeros.

        Sequences that share their query are not padded by this.
        """
        padded = row.new_zeros(len(self.lengths), self.max_seqlen, row.shape[-1])
        return padded.index_put((self.segment_ids, self.position_ids[0]), row)

    def padded_attention_mask(self) -> Tensor:
        """(sequences, max_seqlen) int64, on `device`: 1 on tokens, 0 on padding."""
        return on_device((torch.arange(self.max_seqlen) < self.sequence_lengths[:, None]).long(), self.device)


def on_device(indices: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`. A copy to CUDA goes through pinned memory and does not block."""
    if device.type == "cuda":
        indices = indices.pin_memory()
    return indices.to(device, non_blocking=True)


def _ranges(lengths: Tensor) -> Tensor:
    """Return 0, 1, 2, … up to each length, one range after the other."""
    return torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
