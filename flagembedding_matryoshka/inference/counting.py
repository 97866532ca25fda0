"""What scoring pairs costs, from their tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from flagembedding_matryoshka.inference.batching import cut_batches
from flagembedding_matryoshka.inference.inputs import excerpt
from flagembedding_matryoshka.inference.options import ScoringOptions
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.models.flops import estimate_flops
from flagembedding_matryoshka.setting import Setting, as_layer_tuple
from flagembedding_matryoshka.text.pairs import TokenizedPair


def count_operations(
    config: CostWiseConfig,
    inputs: Sequence[TokenizedPair],
    options: ScoringOptions,
    setting: Setting,
    depths: Sequence[int] | None = None,
) -> int:
    """Floating-point operations of all pairs, in the batches in which they are scored.

    Args:
        depths: for each pair the exit at which it stops; None is the deepest of `setting`.

    Raises:
        TypeError, ValueError: if `depths` are not one of the cutoff layers for each pair.
    """
    if depths is not None:
        depths = as_layer_tuple("depths", depths) or ()
        if len(depths) != len(inputs) or not set(depths) <= set(setting.cutoff_layers):
            raise ValueError(
                f"depths must be one of cutoff_layers={list(setting.cutoff_layers)} for each of {len(inputs)} pairs, "
                f"got {excerpt(list(depths))}."
            )
    total = 0
    for batch in cut_batches(inputs, options.batch_size, options.max_tokens_per_batch):
        pairs = [inputs[index] for index in batch]
        total += estimate_flops(
            config,
            setting,
            query_lengths=torch.tensor([pair.query_length for pair in pairs]),
            passage_lengths=torch.tensor([pair.passage_length for pair in pairs]),
            prompt_lengths=torch.tensor([pair.prompt_length for pair in pairs]),
            shares_prefix=torch.tensor([False, *(a.prefix == b.prefix for a, b in pairwise(pairs))]),
            passage_first=pairs[0].passage_first,
            depths=None if depths is None else torch.tensor([depths[index] for index in batch]),
            read_alone=setting.cutoff_layers if depths is None else {*depths, setting.depth},
        )
    return total


def count_input_tokens(inputs: Sequence[TokenizedPair]) -> tuple[int, list[int]]:
    """Of pairs with one query: the tokens of their lead, which a batch holds once, and each document's own."""
    shared = inputs[0].query_length if inputs else 0
    return shared, [len(pair) - pair.query_length for pair in inputs]
