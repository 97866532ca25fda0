"""The ragged batch: all sequences' tokens in one row, without padding.

Three sequences of 4, 2 and 3 tokens, each made of query part, passage and prompt part, in a row q q p P | q P | q p P:

>>> lengths = torch.tensor([[2, 1, 1], [1, 0, 1], [1, 1, 1]]).T
>>> packed = PackedBatch(*lengths, torch.device("cpu"))
>>> packed.cu_seqlens.tolist(), packed.indices(row_indices).position_ids.tolist()
([0, 4, 6, 9], [[0, 1, 2, 3, 0, 1, 0, 1, 2]])

Sequences that begin with the same query part may share it: it is then a segment of its own, which stands in front of
theirs and which they attend to. The first and the last of these have a query of 2 tokens in common: q q | p P | p p P

>>> lengths = torch.tensor([[2, 0, 0], [0, 1, 1], [0, 2, 1]]).T
>>> packed = PackedBatch(*lengths, torch.device("cpu"), prefixes=torch.tensor([-1, 0, 0]))
>>> packed.cu_seqlens.tolist(), packed.indices(row_indices).position_ids.tolist()
([0, 2, 4, 7], [[0, 1, 2, 3, 2, 3, 4]])
>>> packed.sequence_lengths.tolist(), packed.indices(row_indices).last_tokens.tolist()
([4, 5], [3, 6])
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flagembedding_matryoshka.private import tree_flatten, tree_unflatten
from flagembedding_matryoshka.text.pairs import TokenizedPair

T = TypeVar("T", bound=tuple[Any, ...])
ALIGNMENT = 16
"""Bytes: each tensor in a copy begins at a multiple of this."""


class RowIndices(NamedTuple):
    """Indices that every pass needs.

    Attributes:
        position_ids: (1, total_tokens) int64: position of each token in its sequence.
        segment_ends: (segments,) int64: index of each segment's last token in the row.
        last_tokens: (sequences,) int64: index of each sequence's last token in the row.
        sequences: (sequences,) int64: the segments that end a sequence.
    """

    position_ids: Tensor
    segment_ends: Tensor
    last_tokens: Tensor
    sequences: Tensor


class SegmentIndices(NamedTuple):
    """Indices of segments for each token.

    Attributes:
        own: (total_tokens,) int64: the segment of each token.
        prefixes: (total_tokens,) int64: the segment that this segment continues, or the same segment.
    """

    own: Tensor
    prefixes: Tensor


class TokenIndices(NamedTuple):
    """Tokens of a row that make up another row.

    Attributes:
        tokens: (tokens of the other row,) int64.
    """

    tokens: Tensor


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
        device: the device of `indices`.
        prefixes: the segment that each one continues, -1 for segments that continue none; None if no query is shared.

    Attributes:
        lengths: (segments,) int64, CPU: tokens of each segment.
        offsets: (total_tokens,) int64, CPU: position of each token in its segment.
        prefix_lengths: (segments,) int64, CPU: tokens of the segment that each one continues, or 0.
        context_lengths: (segments,) int64, CPU: tokens that the last token of each segment attends to.
        cu_seqlens: (segments + 1,) int64, CPU: the start of each segment in the row, and at the end the row's length.
        segments: (start, end) of each segment in the row.
        total_tokens: number of tokens in the row.
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
        self.offsets = ranges(lengths)
        self.cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        self.segments = list(pairwise(self.cu_seqlens.tolist()))
        self.total_tokens = len(self.offsets)
        self.sequences = torch.nonzero(~continued)[:, 0]
        self.sequence_lengths = self.context_lengths[self.sequences]
        self._indices: dict[Hashable, Any] = {}
        self._compressed: dict[int, PackedBatch] = {}

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch with its index tensors on `device`."""
        return PackedBatch(self.query_lengths, self.passage_lengths, self.prompt_lengths, device, self.prefixes)

    def compressed(self, ratio: int) -> PackedBatch:
        """Return the batch after `ratio` neighbouring passage tokens became one. It is made once."""
        if ratio not in self._compressed:
            passages = compressed_lengths(self.passage_lengths, ratio)
            parts = (self.query_lengths, passages, self.prompt_lengths)
            self._compressed[ratio] = PackedBatch(*parts, self.device, self.prefixes)
        return self._compressed[ratio]

    def indices(self, make: Callable[[PackedBatch], T]) -> T:
        """Return the tensors that `make` returns for this batch, on `device`. They are made and copied once.

        `copy_indices` copies the indices of several functions and batches at once.

        Args:
            make: returns a tuple, with a name for each item, of CPU tensors, lists of these, or None.
        """
        if make not in self._indices:
            if self.device.type == "cpu":
                self._indices[make] = make(self)
            else:
                copy_indices([(self, make)], self.device)
        return self._indices[make]

    @property
    def max_seqlen(self) -> int:
        """Length of the longest sequence."""
        return int(self.sequence_lengths.max())

    @cached_property
    def context_tokens(self) -> Tensor:
        """(sum of context_lengths,) int64, CPU: index of these tokens in the row, segment after segment."""
        starts = self.cu_seqlens[:-1]
        prefix_starts = starts if self.prefixes is None else starts[self.prefixes]
        lengths = torch.stack([self.prefix_lengths, self.lengths], dim=1).flatten()
        firsts = torch.stack([prefix_starts, starts], dim=1).flatten()
        return ranges(lengths) + firsts.repeat_interleave(lengths)

    @cached_property
    def prefix_ids(self) -> Tensor:
        """(segments,) int64, CPU: the segment that each segment continues, or its own number."""
        own = torch.arange(len(self.lengths))
        return own if self.prefixes is None else torch.where(self.prefixes < 0, own, self.prefixes)

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
        (there,) = on_device([tokens], self.device)
        return selected, there

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

    @cached_property
    def apart(self) -> PackedBatch:
        """The same sequences, none of which shares a segment. `apart_indices` are the tokens that make up its row."""
        chosen = self.sequences
        continued = self.prefix_ids[chosen]
        is_continued = (continued != chosen).long()
        query, passage, prompt = (
            part[chosen] + part[continued] * is_continued
            for part in (self.query_lengths, self.passage_lengths, self.prompt_lengths)
        )
        return PackedBatch(query, passage, prompt, self.device)

    def pad(self, row: Tensor) -> Tensor:
        """A packed row (total_tokens, hidden) as (sequences, max_seqlen, hidden), right-padded with zeros.

        Sequences that share their query are not padded by this.
        """
        padded = row.new_zeros(len(self.lengths), self.max_seqlen, row.shape[-1])
        places = self.indices(segment_indices).own, self.indices(row_indices).position_ids[0]
        return padded.index_put(places, row)

    def padded_attention_mask(self) -> Tensor:
        """(sequences, max_seqlen) int64, on `device`: 1 on tokens, 0 on padding."""
        mask = (torch.arange(self.max_seqlen) < self.sequence_lengths[:, None]).long()
        (there,) = on_device([mask], self.device)
        return there


def pack_pairs(pairs: Sequence[TokenizedPair], device: torch.device, apart: bool = False) -> tuple[Tensor, PackedBatch]:
    """Pack tokenised pairs into one row; neighbours with the same prefix share it.

    Args:
        device: device of the batch's indices.
        apart: a prefix is a segment of its own even if no other pair shares it.

    Returns:
        (1, total_tokens) int64 token ids on the CPU, and where the segments lie among them.
    """
    parts: list[NDArray[np.int32]] = []
    segments: list[tuple[int, int, int, int]] = []
    for prefix, group in groupby(pairs, key=attrgetter("prefix")):
        members = list(group)
        number, query_taken, passage_taken = -1, 0, 0
        is_shared = len(prefix.ids) > 0 and (apart or len(members) > 1)
        if is_shared:
            number, query_taken = len(segments), members[0].query_length
            passage_taken = members[0].passage_length if members[0].passage_first else 0
            parts.append(prefix.ids)
            segments.append((query_taken, passage_taken, 0, -1))
        for pair in members:
            own = [pair.prompt_ids] if pair.passage_first else [pair.passage_ids, pair.prompt_ids]
            parts += own if is_shared else [prefix.ids, *own]
            query, passage = pair.query_length - query_taken, pair.passage_length - passage_taken
            segments.append((query, passage, pair.prompt_length, number))
    query_lengths, passage_lengths, prompt_lengths, prefixes = torch.tensor(segments).unbind(1)
    shared = prefixes if bool((prefixes >= 0).any()) else None
    token_ids = torch.from_numpy(np.concatenate(parts, dtype=np.int64))
    return token_ids[None], PackedBatch(query_lengths, passage_lengths, prompt_lengths, device, shared)


def row_indices(packed: PackedBatch) -> RowIndices:
    ends = packed.cu_seqlens[1:] - 1
    positions = packed.offsets + packed.prefix_lengths.repeat_interleave(packed.lengths)
    return RowIndices(positions[None], ends, ends[packed.sequences], packed.sequences)


def segment_indices(packed: PackedBatch) -> SegmentIndices:
    prefixes = packed.prefix_ids.repeat_interleave(packed.lengths)
    return SegmentIndices(torch.repeat_interleave(packed.lengths), prefixes)


def apart_indices(packed: PackedBatch) -> TokenIndices:
    """The tokens of the row that make up the row of `packed.apart`."""
    ends_sequence = torch.zeros(len(packed.lengths), dtype=torch.bool)
    ends_sequence[packed.sequences] = True
    return TokenIndices(packed.context_tokens[ends_sequence.repeat_interleave(packed.context_lengths)])


def compressed_lengths(passage_lengths: Tensor, ratio: int) -> Tensor:
    """Return the number of groups that passages of these lengths are merged into, ⌈length ÷ ratio⌉.

    Args:
        passage_lengths: int64, of any shape.
    """
    return (passage_lengths + ratio - 1).div(ratio, rounding_mode="floor")


def ranges(lengths: Tensor) -> Tensor:
    """Return 0, 1, 2, … up to each length, one range after the other."""
    return torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)


def copy_indices(
    wanted: Iterable[tuple[PackedBatch, Callable[[PackedBatch], tuple[Any, ...]]]],
    device: torch.device,
    *others: Tensor,
) -> list[Tensor]:
    """Copy indices to a device in one copy.

    Args:
        wanted: batches on `device`, and functions as in `PackedBatch.indices`. Those that are there are left out.
        others: CPU tensors to copy, too.

    Returns:
        `others`, on `device`.
    """
    missing = [(packed, make) for packed, make in dict.fromkeys(wanted) if make not in packed._indices]
    leaves, spec = tree_flatten([make(packed) for packed, make in missing])
    places = [place for place, leaf in enumerate(leaves) if leaf is not None]
    moved = on_device([*others, *(leaves[place] for place in places)], device)
    for place, leaf in zip(places, moved[len(others) :], strict=True):
        leaves[place] = leaf
    for (packed, make), indices in zip(missing, tree_unflatten(leaves, spec), strict=True):
        packed._indices[make] = indices
    return moved[: len(others)]


def on_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return CPU tensors on `device`; on the CPU they are the same tensors."""
    return list(tensors) if device.type == "cpu" or not tensors else in_one_copy(tensors, device)


def in_one_copy(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy CPU tensors of any dtypes to `device` through one buffer. For CUDA it is pinned, and nothing waits."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    spaces = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    buffer = torch.empty(sum(spaces), dtype=torch.uint8, pin_memory=device.type == "cuda")

    def parts(row: Tensor) -> list[Tensor]:
        return [
            space[:size].view(tensor.dtype).view(tensor.shape)
            for space, size, tensor in zip(row.split(spaces), sizes, tensors, strict=True)
        ]

    for part, tensor in zip(parts(buffer), tensors, strict=True):
        part.copy_(tensor)
    return parts(buffer.to(device, non_blocking=True))


def concatenated(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return CPU tensors of one dtype as one tensor on `device`, concatenated along the first dimension.

    For CUDA they are gathered in pinned memory, also from a file that is mapped into memory, and nothing waits.
    """
    shape = sum(map(len, rows)), *rows[0].shape[1:]
    buffer = torch.empty(shape, dtype=rows[0].dtype, pin_memory=device.type == "cuda")
    torch.cat(list(rows), out=buffer)
    return buffer.to(device, non_blocking=True)


def copy_to_host(values: Tensor) -> Callable[[], Tensor]:
    """Queue a copy to the CPU, after the work that makes `values` and before later work.

    Returns:
        A callable that blocks until the copy is complete and returns it.
    """
    if values.device.type != "cuda":
        return values.cpu
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait
