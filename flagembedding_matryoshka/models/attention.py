"""Causal attention inside each sequence of a packed row, and the last token's attention row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from flagembedding_matryoshka.models.batch import PackedBatch, ranges, row_indices
from flagembedding_matryoshka.models.flash import flash_attention, flash_indices, runs_flash
from flagembedding_matryoshka.models.flex import flex_attention, flex_indices, runs_flex

PACKED_ATTENTION = "cost_wise_packed"
SEPARATE_ATTENTION = "cost_wise_packed_separately"
LONGEST_TRAINED_PRODUCT = 512
"""Tokens of a context up to which a CPU trains with whole attention maps, which are kept for the backward pass. This
pass then takes a quarter (bfloat16) or half (float32) of the fused kernel's time. Longer maps would fill the memory."""
LONGEST_PRODUCT = 256
"""Tokens of a context up to which a CPU scores in bfloat16 with whole attention maps: products are much faster than the
fused kernel. Longer maps do not stay in the caches."""
WIDTH_MULTIPLE = 32
"""Widths of attention maps are multiples of this. In bfloat16 a softmax over 192 columns takes half of the time of one
over 190, whose last columns fill no vector of the processor."""

Kernel = Literal["flash", "flex", "groups", "products", "segments", "last tokens"]
"""How attention is computed: one call for the row (flash, flex); a call per group of segments of similar length, with
the fused kernel (groups) or as products and softmax (products); a call per segment; or for the last tokens alone."""


class ContextIndices(NamedTuple):
    """Indices of the contexts of all segments, one after another, for attention of the last tokens.

    Attributes:
        tokens: (sum of context lengths,) int64: the tokens of the contexts in the row.
        segments: (sum of context lengths,) int64: the segment whose context each of these belongs to.
        later: (sum of context lengths,) int64: the number of tokens of its context after each of these.
        own: (total_tokens,) int64: the place of each token of the row among `tokens`.
    """

    tokens: Tensor
    segments: Tensor
    later: Tensor
    own: Tensor


def context_indices(packed: PackedBatch) -> ContextIndices:
    lengths = packed.context_lengths
    firsts = lengths.cumsum(0) - packed.lengths
    return ContextIndices(
        packed.context_tokens,
        torch.repeat_interleave(lengths),
        lengths.repeat_interleave(lengths) - 1 - ranges(lengths),
        packed.offsets + firsts.repeat_interleave(packed.lengths),
    )


class GroupIndices(NamedTuple):
    """The contexts of segments as rectangles, contexts of similar length together, for kernels that want a batch.

    Attributes:
        groups: for each group (segments, width) int64: the tokens in the row. The width is the longest context's
            length, rounded up to a multiple of `WIDTH_MULTIPLE`. A shorter context repeats its last token, and none has
            less than half of the longest one's tokens.
        own: (total_tokens,) int64: the place of each token of the row in all rectangles, flattened.
    """

    groups: list[Tensor]
    own: Tensor


def group_indices(packed: PackedBatch) -> GroupIndices:
    order = packed.context_lengths.argsort(descending=True, stable=True)
    ends = packed.context_lengths.cumsum(0) - 1
    groups: list[Tensor] = []
    firsts = torch.empty_like(packed.lengths)
    size = 0
    while len(order):
        lengths = packed.context_lengths[order]
        group = order[: int((2 * lengths >= lengths[0]).sum())]
        width = math.ceil(int(lengths[0]) / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        order = order[len(group) :]
        begins = ends[group] + 1 - packed.context_lengths[group]
        places = torch.minimum(begins[:, None] + torch.arange(width), ends[group][:, None])
        groups.append(packed.context_tokens[places])
        firsts[group] = size + torch.arange(len(group)) * width + packed.prefix_lengths[group]
        size += len(group) * width
    return GroupIndices(groups, packed.offsets + firsts.repeat_interleave(packed.lengths))


INDICES: dict[Kernel, Callable[[PackedBatch], tuple[Any, ...]]] = {
    "flash": flash_indices,
    "flex": flex_indices,
    "groups": group_indices,
    "products": group_indices,
    "last tokens": context_indices,
}
"""The function that makes the indices of each kernel; "segments" has none."""


@dataclass(frozen=True)
class Logits:
    """Attention logits from products of queries and keys.

    Attributes:
        scaling: factor of the products.
        softcap: the scaled products become softcap · tanh(products / softcap); None is no cap.
        window: number of tokens that a token attends to at most, including itself; None is all tokens before it.
    """

    scaling: float
    softcap: float | None = None
    window: int | None = None

    def visible(self, length: int, device: torch.device) -> Tensor:
        """Return (length, length) bool: the tokens (columns) that each token (row) attends to.

        >>> Logits(scaling=1.0, window=2).visible(4, torch.device("cpu")).int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 1, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
        """
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return causal if self.window is None else causal.triu(1 - self.window)


def packed_attention(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    packed: PackedBatch,
    last_rows: list[Tensor] | None = None,
    only_last: bool = False,
    separately: bool = False,
    compiled: bool = False,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    use_cache: Literal[False] | None = None,
) -> tuple[Tensor, None]:
    """Compute attention in the form of `transformers.AttentionInterface`.

    An unknown keyword of a decoder layer is a TypeError, because attention that ignored it would be wrong.

    Args:
        query: (1, heads, total_tokens, head_dim), after rotary embedding; with `only_last` (1, heads, segments,
            head_dim), that of each segment's last token.
        key, value: (1, kv_heads, total_tokens, head_dim).
        module, attention_mask, position_ids, use_cache: not used. `packed` has the segments, the layer has applied
            positions to queries and keys, and `CostWiseModel` has checked that its attention is causal.
        packed: where the segments lie.
        last_rows: a list to which `last_token_row` is appended; None for none.
        separately: each kernel call computes one segment, so that results are independent of other segments.
        compiled: attention without a kernel may be compiled; without gradients.
        scaling, softcap, sliding_window: see `Logits`.

    Returns:
        (1, tokens of the query, heads, head_dim), and None for the attention map, which never exists.
    """
    logits = Logits(scaling, softcap, sliding_window)
    kernel = choose_kernel(query, packed, softcap, only_last, separately, compiled, dropout)
    if kernel == "last tokens":
        return _of_last_tokens(query[0], key[0], value[0], packed, logits, dropout)[None], None
    if last_rows is not None:
        last_rows.append(last_token_row(query[0], key[0], packed, logits))
    if kernel == "flash":
        return flash_attention(query, key, value, packed, scaling, sliding_window, only_last), None
    if kernel == "flex":
        assert softcap is not None
        return flex_attention(query, key, value, packed, scaling, softcap, sliding_window), None
    if kernel == "groups":
        return _in_groups(query, key, value, packed, logits, dropout), None
    if kernel == "products":
        return _in_products(query, key, value, packed, logits), None
    return _segment_by_segment(query, key, value, packed, logits, dropout), None


def choose_kernel(
    query: Tensor,
    packed: PackedBatch,
    softcap: float | None,
    only_last: bool = False,
    separately: bool = False,
    compiled: bool = False,
    dropout: float = 0.0,
) -> Kernel:
    """Return the kernel that `packed_attention` runs with these arguments.

    Args:
        query: (1, heads, tokens, head_dim); the numbers of heads and tokens do not matter.
    """
    on_cpu = query.device.type == "cpu"
    flash = not on_cpu and runs_flash(query) and softcap is None and not dropout
    if only_last and not flash:
        return "last tokens"
    if separately:
        return "segments"
    if flash:
        return "flash"
    if compiled and softcap is not None and not dropout and runs_flex(query):
        return "flex"
    if not on_cpu:
        return "groups"
    if query.requires_grad:
        longest = LONGEST_TRAINED_PRODUCT
    else:
        longest = LONGEST_PRODUCT if query.dtype == torch.bfloat16 and softcap is None else 0
    if not dropout and packed.context_lengths.max() <= longest:
        return "products"
    return "segments"


def capped(logits: Tensor, softcap: float) -> Tensor:
    """Return attention logits in (-softcap, softcap): softcap · tanh(logits / softcap)."""
    return softcap * torch.tanh(logits / softcap)


def _segment_by_segment(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, logits: Logits, dropout: float = 0.0
) -> Tensor:
    """Compute attention with a call per segment, without padding, for devices where a call costs little."""
    outputs = []
    prefixes = [-1] * len(packed.segments) if packed.prefixes is None else packed.prefixes.tolist()
    for (start, end), prefix in zip(packed.segments, prefixes, strict=True):
        queries, keys, values = (part[:, :, start:end] for part in (query, key, value))
        if prefix >= 0:
            # A prefix's own rows are attended once more and dropped: no mask is needed for a square map.
            before = slice(*packed.segments[prefix])
            queries = torch.cat([query[:, :, before], queries], dim=2)
            keys = torch.cat([key[:, :, before], keys], dim=2)
            values = torch.cat([value[:, :, before], values], dim=2)
        outputs.append(_attend(queries, keys, values, logits, dropout)[:, :, start - end :])
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _in_groups(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, logits: Logits, dropout: float = 0.0
) -> Tensor:
    """Compute attention with a call per group of segments of similar length, padded at the end."""
    groups, own = packed.indices(group_indices)
    outputs = []
    for tokens in groups:
        queries, keys, values = (part[0, :, tokens].transpose(0, 1) for part in (query, key, value))
        outputs.append(_attend(queries, keys, values, logits, dropout).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[own][None]


def _attend(query: Tensor, key: Tensor, value: Tensor, logits: Logits, dropout: float) -> Tensor:
    """Compute causal attention. Query and output are (batch, heads, length, head_dim); key and value have kv_heads."""
    length, kv_heads = query.shape[2], key.shape[1]
    if logits.softcap is None:
        is_whole = logits.window is None or length <= logits.window
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if is_whole else logits.visible(length, query.device),
            dropout_p=dropout,
            is_causal=is_whole,
            scale=logits.scaling,
            enable_gqa=query.shape[1] != kv_heads,
        )
    # No fused kernel has a cap. (batch, kv_heads, heads per kv_head, length, head_dim)
    products = query.unflatten(1, (kv_heads, -1)) @ key.transpose(2, 3)[:, :, None]
    values = capped(products.float() * logits.scaling, logits.softcap)
    masked = values.masked_fill(~logits.visible(length, query.device), float("-inf"))
    maps = F.dropout(masked.softmax(-1), dropout).to(value.dtype)
    return (maps @ value[:, :, None]).flatten(1, 2)


def _in_products(query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, logits: Logits) -> Tensor:
    """Compute attention in the groups of `_in_groups`, as products and softmax."""
    heads, kv_heads, head_dim = query.shape[1], key.shape[1], key.shape[3]
    groups, own = packed.indices(group_indices)
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
        hidden = query.new_zeros(width, width).masked_fill(~logits.visible(width, query.device), float("-inf"))
        hidden = hidden.repeat(heads // kv_heads, 1)
        if logits.softcap is None:
            products = torch.baddbmm(hidden, queries, keys.transpose(1, 2), alpha=logits.scaling)
        else:
            products = capped(torch.bmm(queries, keys.transpose(1, 2)) * logits.scaling, logits.softcap) + hidden
        maps = torch.softmax(products, dim=-1)
        attended = torch.bmm(maps, values).view(count, heads, width, head_dim)
        outputs.append(attended.transpose(1, 2).reshape(count * width, -1))
    return torch.cat(outputs).index_select(0, own).view(1, -1, heads, head_dim)


def last_token_row(query: Tensor, key: Tensor, packed: PackedBatch, logits: Logits) -> Tensor:
    """Return the attention of each segment's last token to each of its tokens, summed over heads.

    Args:
        query: (heads, total_tokens, head_dim).
        key: (kv_heads, total_tokens, head_dim).

    Returns:
        (total_tokens,) float32. The values of a sequence, with its shared query, sum to the number of heads.
    """
    last = query[:, packed.indices(row_indices).segment_ends]
    row = _last_token_maps(last, key, packed, logits).sum((0, 1))
    return row if packed.prefixes is None else row[packed.indices(context_indices).own]


def _of_last_tokens(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, logits: Logits, dropout: float
) -> Tensor:
    """Compute attention of each segment's last token, `query`, to its context: (segments, heads, head_dim)."""
    maps = F.dropout(_last_token_maps(query, key, packed, logits), dropout)
    indices = packed.indices(context_indices)
    if packed.prefixes is not None:
        value = value[:, indices.tokens]
    # (kv_heads, heads per kv_head, sum of context_lengths, head_dim) float32
    weighted = maps[..., None] * value[:, None]
    attended = weighted.new_zeros(*maps.shape[:2], query.shape[1], value.shape[2])
    attended = attended.index_add(2, indices.segments, weighted)
    return attended.flatten(0, 1).transpose(0, 1).to(value.dtype)


def _last_token_maps(last: Tensor, key: Tensor, packed: PackedBatch, logits: Logits) -> Tensor:
    """Return the attention of each segment's last token to each token of its context.

    Args:
        last: (heads, segments, head_dim), queries.
        key: (kv_heads, total_tokens, head_dim).

    Returns:
        (kv_heads, heads per kv_head, sum of context_lengths) float32, which sums to 1 over a context.
    """
    tokens, segments, later, _ = packed.indices(context_indices)
    if packed.prefixes is not None:
        key = key[:, tokens]
    last = last.unflatten(0, (len(key), -1))
    # one product per token and head, nothing quadratic
    values = torch.einsum("kgtd,ktd->kgt", last[:, :, segments], key).float() * logits.scaling
    if logits.softcap is not None:
        values = capped(values, logits.softcap)
    if logits.window is not None:
        values = values.masked_fill(later >= logits.window, float("-inf"))
    shape = values.shape
    values = values.reshape(-1, shape[-1])

    index = segments.expand_as(values)
    per_segment = values.new_zeros(values.shape[0], len(packed.lengths))
    peak = per_segment.scatter_reduce(1, index, values.detach(), "amax", include_self=False)
    weights = (values - peak.gather(1, index)).exp()
    norm = per_segment.scatter_add(1, index, weights)
    return (weights / norm.gather(1, index)).view(shape)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionInterface.register(SEPARATE_ATTENTION, partial(packed_attention, separately=True))
