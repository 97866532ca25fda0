"""Batches as one packed row: padded rows without their padding, and pairs whose neighbours share a prefix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flagembedding_matryoshka.models.batch import PackedBatch, on_device
from flagembedding_matryoshka.text.pairs import TokenizedPair


class _Sequence(NamedTuple):
    """A sequence before it is packed.

    Attributes:
        key: equal for sequences that begin with the same prefix.
        prefix, own: the tokens that neighbours may share and the tokens after them, in any form.
        prefix_lengths: tokens of query part and passage in the prefix.
        lengths: tokens of query part, passage and prompt part in the whole sequence.
    """

    key: Any
    prefix: NDArray[Any]
    own: list[NDArray[Any]]
    prefix_lengths: tuple[int, int]
    lengths: tuple[int, int, int]


def pack_pairs(pairs: Sequence[TokenizedPair], device: torch.device, apart: bool = False) -> tuple[Tensor, PackedBatch]:
    """Pack tokenised pairs into one row; neighbours with the same prefix share it.

    Args:
        device: device of the batch's indices.
        apart: a prefix is a segment of its own even if no other pair shares it.

    Returns:
        (1, total_tokens) int64 token ids on the CPU, and where the segments lie among them.
    """
    sequences = (
        _Sequence(
            pair.prefix,
            pair.prefix.ids,
            [pair.prompt_ids] if pair.passage_first else [pair.passage_ids, pair.prompt_ids],
            (pair.query_length, pair.passage_length if pair.passage_first else 0),
            (pair.query_length, pair.passage_length, pair.prompt_length),
        )
        for pair in pairs
    )
    parts, packed = _with_shared_prefixes(sequences, device, apart)
    token_ids = torch.from_numpy(np.concatenate(parts, dtype=np.int64))
    return token_ids[None], packed


def share_queries(token_ids: Tensor, packed: PackedBatch) -> tuple[Tensor, PackedBatch]:
    """Let neighbours in a row share the query part that they have in common, as a segment before theirs.

    Attention is causal, so the states of a query do not depend on the tokens after it. Scores and gradients stay the
    same.

    Args:
        token_ids: (1, total_tokens) int64, in which no sequence shares a segment.

    Returns:
        (1, fewer_tokens) token ids on the same device, and where the segments lie among them. The arguments, if there
        is nothing to share.
    """
    ids = token_ids[0].cpu().numpy()
    lengths = torch.stack([packed.query_lengths, packed.passage_lengths, packed.prompt_lengths], dim=1).tolist()
    sequences = []
    for (start, end), (query, passage, prompt) in zip(packed.segments, lengths, strict=True):
        shared = query if start + query < end else 0  # at least one token must be the sequence's own
        prefix, own = np.arange(start, start + shared), np.arange(start + shared, end)
        sequences.append(_Sequence(ids[prefix].tobytes(), prefix, [own], (shared, 0), (query, passage, prompt)))
    parts, shared_batch = _with_shared_prefixes(sequences, packed.device)
    tokens = torch.from_numpy(np.concatenate(parts))
    if len(tokens) == len(ids):
        return token_ids, packed
    (there,) = on_device([tokens], token_ids.device)
    return token_ids[:, there], shared_batch


def _with_shared_prefixes(
    sequences: Iterable[_Sequence], device: torch.device, apart: bool = False
) -> tuple[list[NDArray[Any]], PackedBatch]:
    """Return the row's tokens in parts, and where the segments lie. Prefixes that neighbours share stand once."""
    parts: list[NDArray[Any]] = []
    segments: list[tuple[int, int, int, int]] = []
    for _, group in groupby(sequences, key=attrgetter("key")):
        members = list(group)
        prefix, of_prefix = members[0].prefix, members[0].prefix_lengths
        is_shared = len(prefix) > 0 and (apart or len(members) > 1)
        number = len(segments) if is_shared else -1
        if is_shared:
            parts.append(prefix)
            segments.append((*of_prefix, 0, -1))
        query_taken, passage_taken = of_prefix if is_shared else (0, 0)
        for member in members:
            parts += member.own if is_shared else [prefix, *member.own]
            query, passage, prompt = member.lengths
            segments.append((query - query_taken, passage - passage_taken, prompt, number))
    query_lengths, passage_lengths, prompt_lengths, prefixes = torch.tensor(segments).unbind(1)
    shared = prefixes if bool((prefixes >= 0).any()) else None
    return parts, PackedBatch(query_lengths, passage_lengths, prompt_lengths, device, shared)


def pack(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    query_lengths: Sequence[int] | Tensor | None = None,
    prompt_lengths: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, PackedBatch]:
    """Pack an ordinary batch without its padding, which may be on the right or on the left.

    Args:
        input_ids: (batch, length) int64.
        attention_mask: (batch, length), non-zero on tokens; None is no padding.
        query_lengths, prompt_lengths: (batch,) tokens of these parts; None: each row is one query part.

    Returns:
        (1, total_tokens) token ids, and where the sequences lie among them.

    Raises:
        ValueError: if a row is empty or padded in the middle, or the lengths of parts do not fit.
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
