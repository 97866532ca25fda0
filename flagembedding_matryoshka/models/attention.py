"""Causal attention inside each sequence of a packed row, and the last token's attention row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from flagembedding_matryoshka.models.packing import PackedBatch

PACKED_ATTENTION = "cost_wise_packed"
LONGEST_PRODUCT = 512
"""Tokens of a context up to which a CPU learns with whole attention maps: they are kept for the backward pass, which
is then a quarter (bfloat16) or half (float32) of what the fused kernel's takes; beyond, they would fill the memory."""


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
    if query.device.type != "cpu":
        attend = _in_groups
    elif query.requires_grad and packed.context_lengths.max() <= LONGEST_PRODUCT and not dropout:
        return _in_products(query, key, value, packed, scaling), None
    else:
        attend = _segment_by_segment
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    return attend(query, key, value, packed, **options), None


def _segment_by_segment(query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, **options: Any) -> Tensor:
    """A call per segment: no padding, for devices where a call costs little."""
    outputs = []
    prefixes = [-1] * len(packed.segments) if packed.prefixes is None else packed.prefixes.tolist()
    for (start, end), prefix in zip(packed.segments, prefixes, strict=True):
        # A prefix's own rows are attended once more and dropped: no mask is needed for a square map.
        rows = [slice(start, end)] if prefix < 0 else [slice(*packed.segments[prefix]), slice(start, end)]
        attended = F.scaled_dot_product_attention(
            _rows(query, rows), _rows(key, rows), _rows(value, rows), is_causal=True, **options
        )
        outputs.append(attended[:, :, start - end :])
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _in_groups(query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, **options: Any) -> Tensor:
    """A call per group of segments of similar length, padded behind, where causal attention does not look."""
    groups, own = packed.context_groups
    outputs = []
    for tokens in groups:
        queries, keys, values = (part[0, :, tokens].transpose(0, 1) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, **options)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[own][None]


def _in_products(query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, scaling: float) -> Tensor:
    """Groups as above, with attention spelt out: plain products have a faster gradient on a CPU."""
    heads, kv_heads, head_dim = query.shape[1], key.shape[1], key.shape[3]
    groups, own = packed.context_groups
    rows = [part[0].transpose(0, 1).flatten(1) for part in (query, key, value)]
    outputs = []
    for tokens in groups:
        count, width = tokens.shape
        # (count, width, kv_heads, heads per kv_head or 1, head_dim); indices that repeat are summed by index_select
        queries, keys, values = (
            part.index_select(0, tokens.flatten()).view(count, width, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
            for part in rows
        )
        queries = queries.reshape(count * kv_heads, -1, head_dim)
        keys, values = (part.reshape(count * kv_heads, width, head_dim) for part in (keys, values))
        maps = torch.bmm(queries, keys.transpose(1, 2)).view(count * kv_heads, -1, width, width)
        future = torch.full((width, width), float("-inf"), dtype=maps.dtype).triu(1)
        maps = torch.softmax(maps * scaling + future, dim=-1).flatten(1, 2)
        attended = torch.bmm(maps, values).view(count, heads, width, head_dim)
        outputs.append(attended.transpose(1, 2).reshape(count * width, -1))
    return torch.cat(outputs).index_select(0, own).view(1, -1, heads, head_dim)


def _rows(tensor: Tensor, rows: list[slice]) -> Tensor:
    """Some tokens of (1, heads, total_tokens, head_dim)."""
    parts = [tensor[:, :, part] for part in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def last_token_row(query: Tensor, key: Tensor, packed: PackedBatch, scaling: float) -> Tensor:
    """How much each token is attended to by the last token of its segment, summed over heads.

    Args:
        query: (heads, total_tokens, head_dim).
        key: (kv_heads, total_tokens, head_dim).

    Returns:
        (total_tokens,) float32; with those of the query that it shares, a sequence's values sum to the number of heads.
    """
    kv_heads, _, head_dim = key.shape
    heads_per_key = query.shape[0] // kv_heads
    if packed.prefixes is None:
        segments = packed.segment_ids
    else:
        segments = torch.repeat_interleave(packed.context_lengths).to(packed.device)
        key = key[:, packed.context_tokens]
    last = query[:, packed.segment_ends].view(kv_heads, heads_per_key, -1, head_dim)
    # (kv_heads, heads_per_key, total): one product per token and head, nothing quadratic
    logits = torch.einsum("kgtd,ktd->kgt", last[:, :, segments], key).float() * scaling
    logits = logits.reshape(-1, logits.shape[-1])

    index = segments.expand_as(logits)
    per_segment = logits.new_zeros(logits.shape[0], len(packed.lengths))
    peak = per_segment.scatter_reduce(1, index, logits.detach(), "amax", include_self=False)
    weights = (logits - peak.gather(1, index)).exp()
    norm = per_segment.scatter_add(1, index, weights)
    row = (weights / norm.gather(1, index)).sum(0)
    return row if packed.prefixes is None else row[packed.own_in_context]


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
