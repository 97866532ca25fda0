"""The arithmetic that one pass costs, counted from shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from flagembedding_matryoshka.models.configuration import CostWiseMistralConfig, SubNetwork


def estimate_flops(
    config: CostWiseMistralConfig,
    sub_network: SubNetwork,
    query_lengths: Tensor,
    passage_lengths: Tensor,
    prompt_lengths: Tensor,
    shares_query: Tensor | None = None,
    depths: Tensor | None = None,
) -> int:
    """Floating-point operations of matrix products in one pass, a multiplication and an addition counting as two.

    Causal attention is counted over the full square, as `torch.utils.flop_counter` does; norms, activations and
    rotary embedding are left out.

    Args:
        query_lengths, passage_lengths, prompt_lengths: (batch,) int64 tokens of each part, before compression.
        shares_query: (batch,) bool, whether a sequence has its query part from the one before it; None is nowhere.
    """
    heads = config.num_attention_heads
    head_dim = config.head_dim or config.hidden_size // heads
    query_width = heads * head_dim
    key_width = config.num_key_value_heads * head_dim
    per_token = 2 * config.hidden_size * (2 * query_width + 2 * key_width + 3 * config.intermediate_size)

    fixed = query_lengths + prompt_lengths
    passage = passage_lengths
    if depths is None:
        depths = torch.full_like(fixed, sub_network.depth)
    if shares_query is None:
        shares_query = torch.zeros_like(fixed, dtype=torch.bool)
    # Neighbours with one query are a group. Where it has several members, the query is a segment of its own.
    group = (~shares_query).cumsum(0) - 1
    group_query = query_lengths[~shares_query]
    has_segment = group.bincount() > 1

    total = 2 * config.hidden_size * sum(int((depths >= cutoff).sum()) for cutoff in sub_network.cutoff_layers)
    for depth in range(1, sub_network.depth + 1):
        running = depths >= depth
        lengths = (fixed + passage)[running]
        running_groups = group[running].unique()
        queries = group_query[running_groups]
        segments = queries[has_segment[running_groups]]
        total += per_token * int(lengths.sum() - query_lengths[running].sum() + queries.sum())
        total += 4 * query_width * int((lengths**2).sum() + (segments**2).sum())
        if sub_network.compresses_after(depth):
            total += 2 * query_width * int(lengths.sum() + segments.sum())
            passage = torch.div(
                passage + sub_network.compress_ratio - 1, sub_network.compress_ratio, rounding_mode="floor"
            )
    return total
