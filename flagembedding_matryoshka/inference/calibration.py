"""Monotone maps from scores to the probability of relevance, one for each depth and width, because scores of different
exits are not comparable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Isotonic:
    """Piecewise linear between points, constant outside (Zadrozny and Elkan, KDD 2002).

    Attributes:
        scores: the points' scores, ascending.
        probabilities: the points' probabilities, in [0, 1], not falling.

    Raises:
        TypeError: if a value is not a number.
        ValueError: if there is no point, scores do not ascend, or probabilities fall or are not in [0, 1].
    """

    method: ClassVar[str] = "isotonic"
    scores: Sequence[float]
    probabilities: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", tuple(self.scores))
        object.__setattr__(self, "probabilities", tuple(self.probabilities))
        if not all(map(math.isfinite, self.scores)) or any(low >= high for low, high in pairwise(self.scores)):
            raise ValueError(f"the scores of a calibration must ascend: {self.scores}")
        if not all(0 <= value <= 1 for value in self.probabilities) or any(
            low > high for low, high in pairwise(self.probabilities)
        ):
            raise ValueError(f"the probabilities of a calibration lie in [0, 1] and do not fall: {self.probabilities}")
        if not self.scores or len(self.scores) != len(self.probabilities):
            raise ValueError(f"a calibration has {len(self.scores)} scores and {len(self.probabilities)} probabilities")

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the float64 probabilities of scores of any shape."""
        return torch.as_tensor(np.interp(scores.double().numpy(), self.scores, self.probabilities))


@dataclass(frozen=True)
class Platt:
    """sigmoid(slope · score + intercept) (Platt, Probabilistic outputs for support vector machines, 1999).

    Raises:
        TypeError: if a value is not a number.
        ValueError: if one is not finite, or the slope is negative.
    """

    method: ClassVar[str] = "platt"
    slope: float
    intercept: float

    def __post_init__(self) -> None:
        if not 0 <= self.slope < math.inf or not math.isfinite(self.intercept):
            raise ValueError(f"a calibration must not fall: slope {self.slope}, intercept {self.intercept}")

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the float64 probabilities of scores of any shape."""
        return (self.slope * scores.double() + self.intercept).sigmoid()


Calibration = Isotonic | Platt
Normalizer = Callable[[Tensor, int], Tensor]
"""Maps scores that were read at an exit to the values that are returned. It never changes their order."""
METHODS: dict[str, type[Isotonic] | type[Platt]] = {kind.method: kind for kind in (Isotonic, Platt)}


def to_json(calibration: Calibration | None) -> dict[str, Any] | None:
    """Return the JSON value that `from_json` reads."""
    return None if calibration is None else {"method": calibration.method, **asdict(calibration)}


def from_json(stored: Mapping[str, Any] | None) -> Calibration | None:
    """Return the calibration of a JSON value in a plan.

    Raises:
        KeyError, TypeError, ValueError: if the value is not a calibration.
    """
    if stored is None:
        return None
    return METHODS[stored["method"]](**{name: value for name, value in stored.items() if name != "method"})
