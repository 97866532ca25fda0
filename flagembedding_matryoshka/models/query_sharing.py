"""Neighbours in a packed row that begin with the same query part, made to share it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from flagembedding_matryoshka.models.packing import PackedBatch
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
    ids = token_ids[0].tolist()
    queries = packed.query_lengths.tolist()
    starts = [
        (start, start + query) if start + query < end else (start, start)
        for (start, end), query in zip(packed.segments, queries, strict=True)
    ]
    kept: list[int] = []
    segments: list[tuple[int, int, int, int]] = []
    for query_ids, group in groupby(range(len(starts)), key=lambda place: tuple(ids[slice(*starts[place])])):
        members = list(group)
        shared = len(members) > 1 and len(query_ids) > 0
        prefix = len(segments) if shared else -1
        if shared:
            kept += range(*starts[members[0]])
            segments.append((len(query_ids), 0, 0, -1))
        for place in members:
            start, end = packed.segments[place]
            kept += range(start + len(query_ids) if shared else start, end)
            query = 0 if shared else queries[place]
            segments.append((query, int(packed.passage_lengths[place]), int(packed.prompt_lengths[place]), prefix))
    if len(kept) == len(ids):
        return token_ids, packed
    query_lengths, passage_lengths, prompt_lengths, prefixes = torch.tensor(segments).unbind(1)
    tokens = torch.tensor(kept).to(token_ids.device)
    return token_ids[:, tokens], PackedBatch(query_lengths, passage_lengths, prompt_lengths, packed.device, prefixes)


def pack_pairs(pairs: Sequence[TokenizedPair], device: torch.device) -> tuple[Tensor, PackedBatch]:
    """Tokenised pairs as one row; neighbours with the same query part share it.

    Returns:
        token ids (1, total_tokens) on `device` and where the segments lie among them.
    """
    token_ids: list[int] = []
    segments: list[tuple[int, int, int, int]] = []
    for query_ids, group in groupby(pairs, key=lambda pair: pair.query_ids):
        members = list(group)
        shared = len(members) > 1
        prefix = len(segments) if shared else -1
        if shared:
            token_ids += query_ids
            segments.append((len(query_ids), 0, 0, -1))
        for pair in members:
            own = pair.input_ids[len(query_ids) :] if shared else pair.input_ids
            token_ids += own
            query = 0 if shared else len(query_ids)
            segments.append((query, len(own) - query - pair.prompt_length, pair.prompt_length, prefix))
    query_lengths, passage_lengths, prompt_lengths, prefixes = torch.tensor(segments).unbind(1)
    packed = PackedBatch(
        query_lengths, passage_lengths, prompt_lengths, device, prefixes if (prefixes >= 0).any() else None
    )
    return torch.tensor(token_ids)[None].to(device), packed
