"""Floating-point operations of one pass, counted from shapes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from flagembedding_matryoshka.models.backbones import causal_lm_class
from flagembedding_matryoshka.models.batch import compressed_lengths
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.setting import Setting


def _weights_of_a_layer(config: CostWiseConfig) -> tuple[int, int]:
    """Return the number of weights that a token is multiplied with in a decoder layer: in all matrices, and in the
    matrices for its query, key and value."""
    with torch.device("meta"):
        layer: Any = causal_lm_class(config).model_class.layer_class(config, 0)
    whole = sum(linear.weight.numel() for linear in layer.modules() if isinstance(linear, nn.Linear))
    attention = layer.self_attn.named_modules()
    before = sum(part.weight.numel() for name, part in attention if isinstance(part, nn.Linear) and name != "o_proj")
    return whole, before


def reading_share(config: CostWiseConfig) -> float:
    """Return the cost of reading scores at a layer, relative to running the layer."""
    whole, before_attention = _weights_of_a_layer(config)
    return before_attention / whole


def estimate_flops(
    config: CostWiseConfig,
    setting: Setting,
    query_lengths: Tensor,
    passage_lengths: Tensor,
    prompt_lengths: Tensor,
    shares_prefix: Tensor | None = None,
    passage_first: bool = False,
    depths: Tensor | None = None,
    layers_run: int = 0,
    read_alone: Collection[int] | None = None,
    stored: bool = False,
) -> int:
    """Return the floating-point operations of matrix products in one pass; a multiplication and an addition are two.

    Causal attention is counted over the full square, as `torch.utils.flop_counter` does. Norms, activations, rotary
    embedding and heads are not counted. At an exit that is read alone, the layer computes keys and values of all tokens
    and the rest for the last tokens. Then it runs for the sequences that go deeper. Up to the store layer, sequences
    that share their query part are assumed to have the same prompt part, which runs once for them.

    Args:
        query_lengths, passage_lengths, prompt_lengths: (batch,) int64 tokens of each part, before compression.
        shares_prefix: (batch,) bool, whether a sequence shares its prefix with the previous one; None is no sharing.
        passage_first: whether the prefix is query part and passage, instead of the query part alone.
        depths: (batch,) int64, the exit where each sequence stops; None is the deepest of `setting`.
        layers_run: layers at full width that ran before the pass.
        read_alone: the exits that are read alone; None is all cutoff layers of `setting`.
        stored: whether the states of passages after the store layer are read, and not computed.
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
    shares = torch.zeros_like(fixed, dtype=torch.bool) if shares_prefix is None else shares_prefix
    # Neighbours with one prefix are a group. Where it has several members, the prefix is a segment of its own.
    group = (~shares).cumsum(0) - 1
    has_segment = group.bincount() > 1
    # Up to the store layer, a query part with its prompt part is a segment, and so is a passage.
    apart = [fixed, passage[~shares]] if passage_first else [fixed[~shares], passage]
    apart = apart[:1] if stored else apart
    weighs_passages = passage_first and config.compress_weights == "attention"

    def running(depth: int) -> tuple[Tensor, Tensor, int]:
        """Lengths of the sequences, and of the segments that they share, which reach a layer, and their tokens."""
        reach = depths >= depth
        groups = group[reach].unique()
        prefix = query_lengths + passage if passage_first else query_lengths
        prefixes = prefix[~shares][groups]
        lengths = (fixed + passage)[reach]
        tokens = int((lengths - prefix[reach]).sum() + prefixes.sum())
        return lengths, prefixes[has_segment[groups]], tokens

    total = 0
    # After these, a layer has another cost.
    changed = {layers_run, setting.store_layer, *(depth - 1 for depth in depths.tolist())}
    for depth in range(layers_run + 1, setting.depth + 1):
        if depth in read_alone:
            lengths, segments, tokens = running(depth)
            total += before_attention * tokens + per_token * (len(lengths) + len(segments))
            total += 2 * query_width * int(lengths.sum() + segments.sum())
        if depth <= setting.store_layer:
            total += sum(per_token * int(part.sum()) + 4 * query_width * int((part**2).sum()) for part in apart)
            if setting.compresses_after(depth):
                passage = compressed_lengths(passage, setting.compress_ratio)
            continue
        if weighs_passages and setting.compresses_after(depth):  # see CostWiseModel.run
            group, has_segment = torch.arange(len(fixed)), torch.zeros(len(fixed), dtype=torch.bool)
            shares = torch.zeros_like(shares)
            changed.add(depth - 1)
        if depth - 1 in changed:
            lengths, segments, tokens = running(depth + 1)
            layer = per_token * tokens + 4 * query_width * int((lengths**2).sum() + (segments**2).sum())
        total += layer
        if setting.compresses_after(depth):
            if config.compress_weights == "attention":
                total += 2 * query_width * int(lengths.sum() + segments.sum())
            passage = compressed_lengths(passage, setting.compress_ratio)
            changed.add(depth)
    return total
