"""Padded rows as one packed row, without their padding and with the queries that neighbours share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flagembedding_matryoshka.models.batch import PackedBatch, on_device, pack_pairs
from flagembedding_matryoshka.text.pairs import Prefix, TokenizedPair


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
    lengths = torch.stack([packed.query_lengths, packed.passage_lengths], dim=1).tolist()
    pairs = []
    for (start, end), (query, passage) in zip(packed.segments, lengths, strict=True):
        # At least one token must be the sequence's own, so one that is all query becomes a prompt part.
        shared = query if start + query < end else 0
        query_ids, passage_ids, prompt_ids = np.split(ids[start:end], [shared, shared + passage])
        pairs.append(TokenizedPair(Prefix(query_ids, query_ids.tobytes()), passage_ids, prompt_ids))
    shared_ids, shared_batch = pack_pairs(pairs, packed.device)
    if shared_ids.shape == token_ids.shape:
        return token_ids, packed
    (there,) = on_device([shared_ids], token_ids.device)
    return there, shared_batch


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
