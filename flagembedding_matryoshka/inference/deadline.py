"""How long a ranking may take, and how long its steps take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real

from flagembedding_matryoshka.inference.inputs import excerpt


@dataclass(frozen=True)
class Deadline:
    """So many seconds from its start.

    Attributes:
        seconds: above 0; math.inf is any time.
        clock: gives seconds; of the machine, so that its processes agree.
        end: what the clock says then; None before the start.
    """

    seconds: float
    clock: Callable[[], float] = time.monotonic
    end: float | None = None

    @classmethod
    def of(cls, deadline_ms: float | None, clock: Callable[[], float]) -> Deadline | None:
        """From the argument of `MatryoshkaReranker.rank`, not started; None without it.

        Raises:
            TypeError: if it is not a number.
            ValueError: if it is not above 0.
        """
        if deadline_ms is None:
            return None
        if not isinstance(deadline_ms, Real) or isinstance(deadline_ms, bool):
            raise TypeError(f"deadline_ms must be a number, or None for no deadline, got {excerpt(deadline_ms)}.")
        if not deadline_ms > 0:
            raise ValueError(f"deadline_ms is {deadline_ms!r}, but must be above 0, or None for no deadline.")
        return cls(float(deadline_ms) / 1000, clock)

    def start(self) -> Deadline:
        """The same one from now on; one that has started stays as it is."""
        return self if self.end is not None else replace(self, end=self.clock() + self.seconds)

    @property
    def left(self) -> float:
        """Seconds; below 0 when it is over."""
        return self.seconds if self.end is None else self.end - self.clock()


class Pace:
    """How long layers take, by those that have run: a layer so much, and each token in it so much more.

    The line of least squares through what was measured, which neither begins nor falls below 0.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._measured: list[tuple[float, float]] = []
        self._of_layer = self._of_token = 0.0

    @contextmanager
    def measured(self, layers: float, tokens: float) -> Iterator[None]:
        """What happens inside is so many layers, of so many tokens in all of them together."""
        start = self._clock()
        yield
        self._measured.append((tokens / layers, (self._clock() - start) / layers))
        self._of_layer, self._of_token = _line(self._measured)

    def seconds(self, layers: float, tokens: float) -> float:
        """How long these will take; of nothing measured, nothing."""
        return layers * self._of_layer + tokens * self._of_token


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where it begins and how it rises."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else math.inf
    if rise * mean_x > mean_y:
        return 0.0, mean_y / mean_x
    return mean_y - max(0.0, rise) * mean_x, max(0.0, rise)
