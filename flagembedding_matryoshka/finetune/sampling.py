"""Which sub-network a training step runs."""

from __future__ import annotations

import random
from collections.abc import Sequence

from flagembedding_matryoshka.configuration import CostWiseMistralConfig, SubNetwork


def sample_sub_network(
    config: CostWiseMistralConfig,
    compress_layers: Sequence[int],
    compress_ratios: Sequence[int],
    seed: int,
    step: int,
    rank: int,
) -> SubNetwork:
    """All exits, each compress layer on half of the time, the ratio uniform: a function of (seed, step, rank) alone.

    Args:
        step: forward passes that this process has done before.
        rank: the process among all that train together.

    Raises:
        ValueError: if a layer or ratio does not exist.
    """
    draw = random.Random(f"{seed}-{step}-{rank}")
    ratio = draw.choice(list(compress_ratios))
    layers = [layer for layer in compress_layers if draw.random() < 0.5]
    return SubNetwork.resolve(config, config.exit_layers, layers, ratio if layers else 1)
