"""The arithmetic that one pass costs, counted from shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from flagembedding_matryoshka.configuration import CostWiseMistralConfig, SubNetwork


def estimate_flops(
    config: CostWiseMistralConfig,
    sub_network: SubNetwork,
    query_lengths: Tensor,
    passage_lengths: Tensor,
    prompt_lengths: Tensor,
    shares_query: Tensor | None = None,
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

    if shares_query is None:
        shares_query = torch.zeros(len(query_lengths), dtype=torch.bool)
    shared = torch.where(shares_query, query_lengths, 0)
    # A shared query part is a segment of its own, which others attend to.
    next_shares = torch.cat([shares_query[1:], shares_query.new_zeros(1)])
    extra = query_lengths[~shares_query & next_shares]

    fixed = query_lengths + prompt_lengths
    passage = passage_lengths
    total = 0
    for depth in range(1, sub_network.depth + 1):
        lengths = fixed + passage
        total += per_token * int((lengths - shared).sum())
        total += 4 * query_width * int((lengths**2).sum() + (extra**2).sum())
        if sub_network.compresses_after(depth):
            total += 2 * query_width * int(lengths.sum() + extra.sum())
            passage = torch.div(
                passage + sub_network.compress_ratio - 1, sub_network.compress_ratio, rounding_mode="floor"
            )
    return total + 2 * config.hidden_size * len(fixed) * len(sub_network.cutoff_layers)
