"""Training that learns nothing, or has stopped to: found from what is logged, and said once."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

logger = logging.getLogger(__name__)

PATIENCE = 100
"""Steps behind the warm-up after which an exit should have left chance; a real base left it after 60."""
CLOSE = 0.98
CONSTANT = 0.01
"""A spread of scores that changes a softmax by less than a hundredth."""
EXPLODED = 30.0
"""Times the median of what the gradient's norm has been."""
IN_A_ROW = 3
MEMORY = 50
"""Logged gradient norms that the median is of."""


class TrainingCollapsedError(RuntimeError):
    """Going on would be in vain."""


@dataclass(frozen=True)
class ExitState:
    """What an exit has done since the last time that was logged, means over passes and processes.

    Attributes:
        loss: the sum of its terms.
        spread: standard deviation of the scores within a group.
        chance: a term that is ln(group) where scores say nothing; None where the loss has none.
    """

    loss: float
    spread: float
    chance: float | None


class CollapseGuard:
    """Warns of exits at chance, scores that are all the same, losses that are no number, gradients that explode.

    Args:
        group_size: passages per query.
        warmup_steps: steps in which little is expected.
        stop: whether to raise where all of the training has collapsed, not only an exit.
    """

    def __init__(self, group_size: int, warmup_steps: int, stop: bool = False) -> None:
        self.chance = math.log(group_size)
        self.first_step = warmup_steps + PATIENCE
        self.stop = stop
        self._told: set[int | str] = set()
        self._norms: deque[float] = deque(maxlen=MEMORY)
        self._exploded = 0

    def check(self, step: int, exits: Mapping[int, ExitState], gradient_norm: float | None = None) -> list[str]:
        """What is new to be warned of; it is logged.

        Args:
            step: optimizer steps behind.
            exits: exit to what it has done.
            gradient_norm: of the last step, before it was clipped; None where it is not known.

        Raises:
            TrainingCollapsedError: with `stop`, if no exit learns any more.
        """
        found = {"loss": self._not_finite(exits), "gradient": self._explosion(gradient_norm)}
        fatal = [message for message in found.values() if message]
        if not fatal and step >= self.first_step:
            silent = [layer for layer, state in exits.items() if self._says_nothing(state)]
            if silent == list(exits):
                found["scores"] = self._at_chance(exits)
                fatal.append(found["scores"])
            elif new := [layer for layer in silent if layer not in self._told]:
                self._told.update(new)
                found["exits"] = (
                    f"the exits {new} rank no better than chance, others do. An exit may be too shallow for the task: "
                    "leave it out (--exits), or let it weigh less (--exit_weights)."
                )
        new_messages = []
        for name, message in found.items():
            if message and (name == "exits" or name not in self._told):
                self._told.add(name)
                new_messages.append(f"After {step} steps {message}")
                logger.warning(new_messages[-1])
        if fatal and self.stop:
            raise TrainingCollapsedError(f"--stop_on_collapse: after {step} steps {fatal[0]}")
        return new_messages

    def _says_nothing(self, state: ExitState) -> bool:
        at_chance = state.chance is not None and state.chance > CLOSE * self.chance
        return at_chance or state.spread < CONSTANT

    def _at_chance(self, exits: Mapping[int, ExitState]) -> str:
        widest = max(state.spread for state in exits.values())
        if widest < CONSTANT:
            return (
                f"no exit tells passages apart: within a group scores spread by {widest:.2g} at most. The learning "
                "rate may have been too high (--learning_rate, --warmup_ratio), or is too low to move anything."
            )
        return (
            f"no exit ranks better than chance: the loss is still ln(group) = {self.chance:.2f}. Negatives may all be "
            "too hard (--random_negatives 0.5), the learning rate too low or too high (--learning_rate), positives no "
            "better than negatives in the data, or a teacher's own scores all alike."
        )

    def _not_finite(self, exits: Mapping[int, ExitState]) -> str:
        broken = [layer for layer, state in exits.items() if not math.isfinite(state.loss)]
        if not broken:
            return ""
        return (
            f"the loss of the exits {broken} is no number. In float16 values beyond 65,504 overflow: use --bf16. "
            "Otherwise lower --learning_rate or --max_grad_norm, and look for teacher scores that are far off."
        )

    def _explosion(self, norm: float | None) -> str:
        if norm is None:
            return ""
        usual = median(self._norms) if len(self._norms) >= IN_A_ROW else math.inf
        large = not norm <= EXPLODED * usual
        self._exploded = self._exploded + 1 if large else 0
        if not large and math.isfinite(norm):
            self._norms.append(norm)
        if self._exploded < IN_A_ROW:
            return ""
        return (
            f"the gradient's norm has been {norm:.3g} or so {IN_A_ROW} times in a row, and was {usual:.3g} before. "
            "Lower --learning_rate, lengthen the warm-up (--warmup_ratio), or use --bf16 instead of --fp16."
        )
