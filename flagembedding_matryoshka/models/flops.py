"""The arithmetic that one pass costs, counted from shapes alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from flagembedding_matryoshka.models.backbones import causal_lm_class
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.setting import Setting


def _weights_of_a_layer(config: CostWiseConfig) -> tuple[int, int]:
    """Weights of the matrices that a token is multiplied with in a decoder layer: of all, and of those up to its
    query, key and value."""
    with torch.device("meta"):
        layer: Any = causal_lm_class(config).model_class.layer_class(config, 0)
    whole = sum(linear.weight.numel() for linear in layer.modules() if isinstance(linear, nn.Linear))
    attention = layer.self_attn.named_modules()
    before = sum(part.weight.numel() for name, part in attention if isinstance(part, nn.Linear) and name != "o_proj")
    return whole, before


def reading_share(config: CostWiseConfig) -> float:
    """What it costs to read a score at a layer, as a share of running it."""
    whole, before_attention = _weights_of_a_layer(config)
    return before_attention / whole


def estimate_flops(
    config: CostWiseConfig,
    setting: Setting,
    query_lengths: Tensor,
    passage_lengths: Tensor,
    prompt_lengths: Tensor,
    shares_query: Tensor | None = None,
    depths: Tensor | None = None,
    layers_run: int = 0,
    read_alone: Collection[int] | None = None,
) -> int:
    """Floating-point operations of matrix products in one pass, a multiplication and an addition counting as two.

    Causal attention is counted over the full square, as `torch.utils.flop_counter` does; norms, activations,
    rotary embedding and heads are left out. A layer that is read alone gives keys and values of all tokens and the rest
    of the last ones, before it runs for those that go deeper.

    Args:
        query_lengths, passage_lengths, prompt_lengths: (batch,) int64 tokens of each part, before compression.
        shares_query: (batch,) bool, whether a sequence has its query part from the one before it; None is nowhere.
        depths: (batch,) int64, the exit at which each sequence stops; None is the deepest of `setting`.
        layers_run: full-width layers that the pass finds done.
        read_alone: the exits that are read alone; None is all cutoff layers of `setting`.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query_width = config.num_attention_heads * head_dim
    per_token, before_attention = (2 * weights for weights in _weights_of_a_layer(config))

    fixed = query_lengths + prompt_lengths
    passage = passage_lengths
    if read_alone is None:
        read_alone = setting.cutoff_layers
    if depths is None:
        depths = torch.full_like(fixed, setting.depth)
    if shares_query is None:
        shares_query = torch.zeros_like(fixed, dtype=torch.bool)
    # Neighbours with one query are a group. Where it has several members, the query is a segment of its own.
    group = (~shares_query).cumsum(0) - 1
    group_query = query_lengths[~shares_query]
    has_segment = group.bincount() > 1

    def running(depth: int) -> tuple[Tensor, Tensor, int]:
        """Lengths of the sequences, and of the segments that they share, which reach a layer, and their tokens."""
        reach = depths >= depth
        groups = group[reach].unique()
        queries = group_query[groups]
        lengths = (fixed + passage)[reach]
        return lengths, queries[has_segment[groups]], int((lengths - query_lengths[reach]).sum() + queries.sum())

    total = 0
    changed = {layers_run, *(depth - 1 for depth in depths.tolist())}  # behind them, a layer costs something else
    for depth in range(layers_run + 1, setting.depth + 1):
        if depth in read_alone:
            lengths, segments, tokens = running(depth)
            total += before_attention * tokens + per_token * (len(lengths) + len(segments))
            total += 2 * query_width * int(lengths.sum() + segments.sum())
        if depth - 1 in changed:
            lengths, segments, tokens = running(depth + 1)
            layer = per_token * tokens + 4 * query_width * int((lengths**2).sum() + (segments**2).sum())
        total += layer
        if setting.compresses_after(depth):
            total += 2 * query_width * int(lengths.sum() + segments.sum())
            passage = torch.div(passage + setting.compress_ratio - 1, setting.compress_ratio, rounding_mode="floor")
            changed.add(depth)
    return total
