"""Exits that have learnt nothing yet."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

logger = logging.getLogger(__name__)

PATIENCE = 100
"""Steps behind the warm-up after which an exit should have left chance; a real base left it after 60."""
CLOSE = 0.98


class ChanceGuard:
    """Warns, once for each exit, that its loss is still that of chance.

    Args:
        group_size: passages per query; scores that say nothing give a contrastive loss of ln(group_size).
        warmup_steps: steps in which little is expected.
    """

    def __init__(self, group_size: int, warmup_steps: int) -> None:
        self.chance = math.log(group_size)
        self.first_step = warmup_steps + PATIENCE
        self._told: set[int] = set()

    def check(self, step: int, contrastive: Mapping[int, float]) -> list[int]:
        """Exits that are at chance though `step` is late enough, and have not been named before; they are logged.

        Args:
            contrastive: exit to its mean contrastive loss since the last check.
        """
        if step < self.first_step:
            return []
        stuck = [layer for layer, loss in contrastive.items() if loss > CLOSE * self.chance and layer not in self._told]
        self._told.update(stuck)
        if stuck:
            logger.warning(
                "After %d steps the exits %s rank no better than chance: their contrastive loss is still ln(group) = "
                "%.2f. A shallow exit may just be too shallow. If it is all of them, negatives may all be too hard "
                "(--random_negatives 0.5), the learning rate may be too low or too high (--learning_rate), or "
                "positives may be no better than negatives in the data.",
                step,
                stuck,
                self.chance,
            )
        return stuck
