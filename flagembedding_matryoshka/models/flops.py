"""The arithmetic that one pass costs, counted from shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flagembedding_matryoshka.models.backbones import causal_lm_class
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.setting import Setting


def _weights_of_a_layer(config: CostWiseConfig) -> int:
    """Weights of all matrices that a token is multiplied with in a decoder layer."""
    with torch.device("meta"):
        layer = causal_lm_class(config).model_class.layer_class(config, 0)
    return sum(linear.weight.numel() for linear in layer.modules() if isinstance(linear, nn.Linear))


def estimate_flops(
    config: CostWiseConfig,
    setting: Setting,
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
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query_width = config.num_attention_heads * head_dim
    per_token = 2 * _weights_of_a_layer(config)

    fixed = query_lengths + prompt_lengths
    passage = passage_lengths
    if depths is None:
        depths = torch.full_like(fixed, setting.depth)
    if shares_query is None:
        shares_query = torch.zeros_like(fixed, dtype=torch.bool)
    # Neighbours with one query are a group. Where it has several members, the query is a segment of its own.
    group = (~shares_query).cumsum(0) - 1
    group_query = query_lengths[~shares_query]
    has_segment = group.bincount() > 1

    total = 2 * config.hidden_size * sum(int((depths >= cutoff).sum()) for cutoff in setting.cutoff_layers)
    changed = {0, *depths.tolist()}  # layers behind which a layer costs something else than the one before
    for depth in range(1, setting.depth + 1):
        if depth - 1 in changed:
            running = depths >= depth
            lengths = (fixed + passage)[running]
            running_groups = group[running].unique()
            queries = group_query[running_groups]
            segments = queries[has_segment[running_groups]]
            layer = per_token * int(lengths.sum() - query_lengths[running].sum() + queries.sum())
            layer += 4 * query_width * int((lengths**2).sum() + (segments**2).sum())
        total += layer
        if setting.compresses_after(depth):
            total += 2 * query_width * int(lengths.sum() + segments.sum())
            passage = torch.div(passage + setting.compress_ratio - 1, setting.compress_ratio, rounding_mode="floor")
            changed.add(depth)
    return total
