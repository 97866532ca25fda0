"""Causal attention inside each sequence of a packed row, and the last token's attention row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from flagembedding_matryoshka.packing import PackedBatch

PACKED_ATTENTION = "cost_wise_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    packed: PackedBatch,
    last_rows: list[Tensor] | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in the form of `transformers.AttentionInterface`.

    Args:
        query: (1, heads, total_tokens, head_dim), after rotary embedding.
        key, value: (1, kv_heads, total_tokens, head_dim).
        attention_mask: unused by this form; `packed` says what belongs together.
        packed: where the sequences lie.
        last_rows: if given, `last_token_row` is appended to it.

    Returns:
        (1, total_tokens, heads, head_dim), and None for the attention map, which never exists.
    """
    if last_rows is not None:
        last_rows.append(last_token_row(query[0], key[0], packed, scaling))
    output = torch.cat(
        [
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                dropout_p=dropout,
                is_causal=True,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            for start, end in packed.segments
        ],
        dim=2,
    )
    return output.transpose(1, 2).contiguous(), None


def last_token_row(query: Tensor, key: Tensor, packed: PackedBatch, scaling: float) -> Tensor:
    """How much each token is attended to by the last token of its sequence, summed over heads.

    Args:
        query: (heads, total_tokens, head_dim).
        key: (kv_heads, total_tokens, head_dim).

    Returns:
        (total_tokens,) float32; each sequence's values sum to the number of heads.
    """
    kv_heads, total, head_dim = key.shape
    heads_per_key = query.shape[0] // kv_heads
    last = query[:, packed.last_tokens].view(kv_heads, heads_per_key, -1, head_dim)
    # (kv_heads, heads_per_key, total): one product per token and head, nothing quadratic
    logits = torch.einsum("kgtd,ktd->kgt", last[:, :, packed.sequence_ids], key).float() * scaling
    logits = logits.reshape(-1, total)

    sequences = packed.sequence_ids.expand_as(logits)
    per_sequence = logits.new_zeros(logits.shape[0], len(packed.lengths))
    peak = per_sequence.scatter_reduce(1, sequences, logits.detach(), "amax", include_self=False)
    weights = (logits - peak.gather(1, sequences)).exp()
    norm = per_sequence.scatter_add(1, sequences, weights)
    return (weights / norm.gather(1, sequences)).sum(0)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
