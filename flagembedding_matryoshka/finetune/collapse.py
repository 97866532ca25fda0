"""Detection of collapsed training from the logged values. Each finding is warned of once."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

logger = logging.getLogger(__name__)

PATIENCE = 100
"""Steps after the warm-up in which an exit may rank at chance. With SmolLM2 as the base it took 60 steps."""
CLOSE = 0.98
"""A loss above this share of the loss of chance counts as chance."""
CONSTANT = 0.01
"""Scores with a smaller standard deviation count as equal: they change a softmax by less than 1 %."""
EXPLODED = 30.0
"""A gradient norm above this multiple of the median counts as exploded."""
IN_A_ROW = 3
"""Number of consecutive exploded norms that are warned of."""
MEMORY = 50
"""Number of logged gradient norms in the median."""


class TrainingCollapsedError(RuntimeError):
    """All exits have stopped learning."""


@dataclass(frozen=True)
class ExitState:
    """An exit's values since the last log, means over passes and processes.

    Attributes:
        loss: sum of the terms of its loss.
        spread: standard deviation of the scores within a group.
        softmax_loss: a term that is ln(group) for equal scores; None if the loss has no such term.
    """

    loss: float
    spread: float
    softmax_loss: float | None


class CollapseGuard:
    """Warns of exits at chance, equal scores, losses that are not finite, and exploding gradients.

    Args:
        group_size: passages per query.
        warmup_steps: steps of the warm-up, in which exits are not checked for chance.
        stop: raise if all exits have collapsed. A single exit never raises.
    """

    def __init__(self, group_size: int, warmup_steps: int, stop: bool = False) -> None:
        self.chance = math.log(group_size)
        self.first_step = warmup_steps + PATIENCE
        self.stop = stop
        self._warned: set[int | str] = set()
        self._norms: deque[float] = deque(maxlen=MEMORY)
        self._exploded = 0

    def check(self, step: int, exits: Mapping[int, ExitState], gradient_norm: float | None = None) -> list[str]:
        """Log and return the new warnings.

        Args:
            step: number of optimizer steps so far.
            exits: values of each exit.
            gradient_norm: norm of the last step's gradient before clipping; None if unknown.

        Raises:
            TrainingCollapsedError: with `stop`, if all exits have collapsed.
        """
        found = {"loss": self._not_finite(exits), "gradient": self._explosion(gradient_norm)}
        fatal = [message for message in found.values() if message]
        if not fatal and step >= self.first_step:
            stuck = [layer for layer, state in exits.items() if self._is_stuck(state)]
            if stuck == list(exits):
                found["scores"] = self._at_chance(exits)
                fatal.append(found["scores"])
            elif new := [layer for layer in stuck if layer not in self._warned]:
                self._warned.update(new)
                found["exits"] = (
                    f"the exits {new} rank at chance, other exits do not. An exit may be too shallow for the task: "
                    "leave it out (--exits), or lower its weight (--exit_weights)."
                )
        new_messages = []
        for name, message in found.items():
            if message and (name == "exits" or name not in self._warned):
                self._warned.add(name)
                new_messages.append(f"After {step} steps {message}")
                logger.warning(new_messages[-1])
        if fatal and self.stop:
            raise TrainingCollapsedError(f"--stop_on_collapse: after {step} steps {fatal[0]}")
        return new_messages

    def _is_stuck(self, state: ExitState) -> bool:
        at_chance = state.softmax_loss is not None and state.softmax_loss > CLOSE * self.chance
        return at_chance or state.spread < CONSTANT

    def _at_chance(self, exits: Mapping[int, ExitState]) -> str:
        widest = max(state.spread for state in exits.values())
        if widest < CONSTANT:
            return (
                f"every exit gives equal scores: their standard deviation within a group is at most {widest:.2g}. The "
                "learning rate may be too high or too low (--learning_rate, --warmup_ratio)."
            )
        return (
            f"every exit ranks at chance: the loss is still ln(group) = {self.chance:.2f}. All negatives may be too "
            "hard (--random_negatives 0.5), the learning rate too low or too high (--learning_rate), the labels wrong, "
            "or a teacher's scores equal."
        )

    def _not_finite(self, exits: Mapping[int, ExitState]) -> str:
        broken = [layer for layer, state in exits.items() if not math.isfinite(state.loss)]
        if not broken:
            return ""
        return (
            f"the loss of the exits {broken} is not finite. In float16, values beyond 65,504 overflow: use --bf16. "
            "Otherwise lower --learning_rate or --max_grad_norm, and look for extreme teacher scores."
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
            f"the gradient norm is {norm:.3g}, was as large in the last {IN_A_ROW} logs, and {usual:.3g} before. "
            "Lower --learning_rate, lengthen the warm-up (--warmup_ratio), or use --bf16 instead of --fp16."
        )
