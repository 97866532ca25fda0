"""Passages apart from their queries, in the layers up to the store layer.

Two sequences, q q a b p | q q c p. The query part and prompt part of each are a segment, and each passage is one:

>>> packed = PackedBatch(*torch.tensor([[2, 2], [2, 1], [1, 1]]), torch.device("cpu"))
>>> ids, split = split_passages(torch.tensor([[7, 8, 1, 2, 9, 7, 8, 3, 9]]), packed)
>>> ids.tolist(), split.batch.offsets.tolist()
([[7, 8, 9, 1, 2, 7, 8, 9, 3]], [0, 1, 2, 0, 1, 0, 1, 2, 0])
>>> split.join(ids[..., None], packed).flatten().tolist()
[7, 8, 1, 2, 9, 7, 8, 3, 9]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from flagembedding_matryoshka.models.batch import PackedBatch, TokenIndices, concatenated, on_device, ranges

StateQuantization = Literal["int8"]
"""Format of stored states that is not the model's dtype."""
BLOCK = 32
"""Channels of a state in int8 that share a scale, as in GGUF's Q8_0. Outliers of the others do not coarsen them."""
SCALE = torch.bfloat16
"""dtype of the scales: with the exponents of float32, no block's scale is 0 or infinite."""


class SplitBatch:
    """Where queries and passages lie in a row of their own, and how they are joined to the row of whole sequences.

    A sequence without its passage, query part and prompt part, is a segment. Neighbours that share a query part and
    have the same prompt part share this segment. Each passage is a segment, too. No segment continues another one, so
    all positions begin at 0.

    Args:
        batch: where the segments lie.
        firsts: (segments of the whole sequences, 3) int64, CPU: the token of the row where each one's query part,
            passage and prompt part begin. Stored passages stand after the row.
        stored: (1, tokens, hidden) states of stored passages after the store layer, compressed there, or the rows of
            `to_int8`; None if passages are in the row.
    """

    def __init__(self, batch: PackedBatch, firsts: Tensor, stored: Tensor | None = None) -> None:
        self.batch, self.firsts, self.stored = batch, firsts, stored

    def tokens(self, packed: PackedBatch) -> TokenIndices:
        """Return the tokens of the row that make up the row of whole sequences, on the CPU."""
        lengths = torch.stack([packed.query_lengths, packed.passage_lengths, packed.prompt_lengths], dim=1).flatten()
        return TokenIndices(ranges(lengths) + self.firsts.flatten().repeat_interleave(lengths))

    def join(self, hidden: Tensor, packed: PackedBatch) -> Tensor:
        """Return the states of whole sequences.

        Args:
            hidden: (1, total_tokens of `batch`, hidden).
            packed: the whole sequences.

        Returns:
            (1, total_tokens of `packed`, hidden).
        """
        row = hidden
        if self.stored is not None:
            states = from_int8(self.stored, hidden.shape[-1]) if self.stored.dtype == torch.int8 else self.stored
            row = torch.cat([hidden, states.to(hidden)], dim=1)
        return row[:, packed.indices(self.tokens).tokens]


def split_passages(
    token_ids: Tensor, packed: PackedBatch, stored: Sequence[Tensor] | None = None
) -> tuple[Tensor, SplitBatch]:
    """Split the passages of a packed row from their queries.

    Args:
        token_ids: (1, total_tokens) int64.
        packed: where the segments lie among them.
        stored: for each sequence the (passage tokens, hidden) states of its passage, on the CPU, or for all of
            them the rows of `to_int8`. The split row then has no passages, and their token ids do not matter. None:
            passages are in the row.

    Returns:
        (1, tokens) token ids of the split row, on the same device, and where its segments lie.
    """
    ids = token_ids[0].cpu().numpy()
    starts = packed.cu_seqlens.tolist()
    lengths = torch.stack([packed.query_lengths, packed.passage_lengths, packed.prompt_lengths], dim=1).tolist()
    prefixes = [-1] * len(lengths) if packed.prefixes is None else packed.prefixes.tolist()
    continued = set(prefixes)
    parts: list[NDArray[np.int64]] = []
    segments: list[tuple[int, int, int]] = []
    firsts = [[0, 0, 0] for _ in lengths]
    size = states_before = 0

    def add(tokens: list[NDArray[np.int64]], segment: tuple[int, int, int]) -> int:
        """Add a segment, and return its first token."""
        nonlocal size
        if sum(segment):
            parts.extend(tokens)
            segments.append(segment)
        size += sum(segment)
        return size - sum(segment)

    known: dict[tuple[int, bytes, bytes], int] = {}
    for number, (query, passage, prompt) in enumerate(lengths):
        own_query, own_passage, own_prompt = np.split(
            np.arange(starts[number], starts[number + 1]), [query, query + passage]
        )
        prefix = prefixes[number]
        if number not in continued:
            shared = np.arange(0) if prefix < 0 else np.arange(starts[prefix], starts[prefix] + lengths[prefix][0])
            key = (number if prefix < 0 else prefix, ids[own_query].tobytes(), ids[own_prompt].tobytes())
            if key not in known:
                known[key] = add([shared, own_query, own_prompt], (len(shared) + query, 0, prompt))
            firsts[number][0], firsts[number][2] = known[key] + len(shared), known[key] + len(shared) + query
            if prefix >= 0:
                firsts[prefix][0] = known[key]
        if stored is None:
            firsts[number][1] = add([own_passage], (0, passage, 0))
        else:
            firsts[number][1], states_before = states_before, states_before + passage
    queries, passages, prompts = torch.tensor(segments).unbind(1)
    batch = PackedBatch(queries, passages, prompts, packed.device)
    (there,) = on_device([torch.from_numpy(np.concatenate(parts))], token_ids.device)
    places = torch.tensor(firsts)
    if stored is None:
        return token_ids[:, there], SplitBatch(batch, places)
    places[:, 1] += size
    states = concatenated(stored, packed.device)[None]
    return token_ids[:, there], SplitBatch(batch, places, states)


def to_int8(states: Tensor) -> Tensor:
    """Round states to int8, in blocks of `BLOCK` channels. The scale of a block is its largest magnitude ÷ 127.

    >>> rows = to_int8(torch.tensor([[1.5, -3.96875, 0.0], [0.0, 0.0, 0.0]]))
    >>> rows[:, :3].tolist(), from_int8(rows, 3).tolist()
    ([[48, -127, 0], [0, 0, 0]], [[1.5, -3.96875, 0.0], [0.0, 0.0, 0.0]])

    Args:
        states: (tokens, hidden), of a floating-point dtype.

    Returns:
        (tokens, hidden + 2 · ⌈hidden ÷ BLOCK⌉) int8: the values of each state, and then the bytes of its scales,
        bfloat16.
    """
    hidden = states.shape[1]
    values = pad(states.float(), (0, -hidden % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = (values.abs().amax(2) / 127).clamp_min(torch.finfo(SCALE).tiny).to(SCALE)
    # A scale that bfloat16 rounds down brings its largest value to 127.25 at most, which is rounded to 127.
    rounded = (values / scales[..., None].float()).round().to(torch.int8).flatten(1)
    return torch.cat([rounded[:, :hidden], scales.view(torch.int8)], dim=1)


def from_int8(rows: Tensor, hidden: int) -> Tensor:
    """Return the (…, hidden) float32 states of rows that `to_int8` returned."""
    values, scales = rows[..., :hidden], rows[..., hidden:].clone(memory_format=torch.contiguous_format).view(SCALE)
    of_values = scales[..., None].expand(*scales.shape, BLOCK).flatten(-2)[..., :hidden]
    return values * of_values.float()
