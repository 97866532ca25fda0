"""Neighbours in a packed row that begin with the same query part, made to share it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flagembedding_matryoshka.models.packing import PackedBatch
from flagembedding_matryoshka.text.encoding import Ids
from flagembedding_matryoshka.text.pairs import TokenizedPair


def share_queries(token_ids: Tensor, packed: PackedBatch) -> tuple[Tensor, PackedBatch]:
    """The same sequences with every query part that neighbours have in common as one segment in front of theirs.

    Attention is causal, so the states of a query do not depend on what follows it: scores and gradients stay the same.

    Args:
        token_ids: (1, total_tokens) int64, in which nothing is shared yet.

    Returns:
        token ids (1, fewer_tokens) on the same device and where the segments lie among them; what was given, where
        there is nothing to share.
    """
    ids = token_ids[0].cpu().numpy()
    queries = packed.query_lengths.tolist()
    starts = [
        (start, start + query) if start + query < end else (start, start)
        for (start, end), query in zip(packed.segments, queries, strict=True)
    ]
    kept: list[NDArray[np.int64]] = []
    segments: list[tuple[int, int, int, int]] = []
    for _, group in groupby(range(len(starts)), key=lambda place: ids[slice(*starts[place])].tobytes()):
        members = list(group)
        first, behind = starts[members[0]]
        size = behind - first if len(members) > 1 else 0
        prefix = len(segments) if size else -1
        if size:
            kept.append(np.arange(first, behind))
            segments.append((size, 0, 0, -1))
        for place in members:
            start, end = packed.segments[place]
            kept.append(np.arange(start + size, end))
            query = 0 if size else queries[place]
            segments.append((query, int(packed.passage_lengths[place]), int(packed.prompt_lengths[place]), prefix))
    tokens = torch.from_numpy(np.concatenate(kept))
    if len(tokens) == len(ids):
        return token_ids, packed
    query_lengths, passage_lengths, prompt_lengths, prefixes = torch.tensor(segments).unbind(1)
    shared = PackedBatch(query_lengths, passage_lengths, prompt_lengths, packed.device, prefixes)
    return token_ids[:, tokens.to(token_ids.device)], shared


def pack_pairs(pairs: Sequence[TokenizedPair], device: torch.device, apart: bool = False) -> tuple[Tensor, PackedBatch]:
    """Tokenised pairs as one row; neighbours with the same prefix share it.

    Args:
        apart: a prefix is a segment of its own even where nobody shares it.

    Returns:
        token ids (1, total_tokens) int64 on `device` and where the segments lie among them.
    """
    parts: list[Ids] = []
    segments: list[tuple[int, int, int, int]] = []
    for prefix, group in groupby(pairs, key=lambda pair: pair.prefix):
        members = list(group)
        is_shared = apart or len(members) > 1
        number = len(segments) if is_shared else -1
        if is_shared:
            parts.append(prefix.ids)
            segments.append((members[0].query_length, len(prefix) - members[0].query_length, 0, -1))
        for pair in members:
            if not is_shared:
                parts.append(prefix.ids)
            if not pair.passage_first:
                parts.append(pair.passage_ids)
            parts.append(pair.prompt_ids)
            passage = 0 if is_shared and pair.passage_first else pair.passage_length
            segments.append((0 if is_shared else pair.query_length, passage, pair.prompt_length, number))
    query_lengths, passage_lengths, prompt_lengths, prefixes = torch.tensor(segments).unbind(1)
    packed = PackedBatch(
        query_lengths, passage_lengths, prompt_lengths, device, prefixes if (prefixes >= 0).any() else None
    )
    token_ids = torch.from_numpy(np.concatenate(parts, dtype=np.int64))
    return token_ids[None].to(device), packed
