"""Which sub-network a training step runs."""

from __future__ import annotations

import random
from collections.abc import Sequence

from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.setting import Setting


def sample_setting(
    config: CostWiseConfig,
    compress_layers: Sequence[int],
    compress_ratios: Sequence[int],
    seed: int,
    step: int,
) -> Setting:
    """All exits, each compress layer on half of the time, the ratio uniform: a function of (seed, step) alone.

    All processes run the same layers in the same order, without which sharded ones would wait for each other for ever.

    Args:
        step: forward passes that a process has done before.

    Raises:
        ValueError: if a layer or ratio does not exist.
    """
    draw = random.Random(f"{seed}-{step}")
    ratio = draw.choice(list(compress_ratios))
    layers = [layer for layer in compress_layers if draw.random() < 0.5]
    return Setting.resolve(config, config.exit_layers, layers, ratio if layers else 1)
