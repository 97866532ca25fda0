"""Sides of a comparison, and whether they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from flagembedding_matryoshka.evaluation.significance import holm, paired_p_value


@dataclass(frozen=True, eq=False)
class Arm:
    """One side of a comparison: a row of a table.

    Attributes:
        names: column to cell, what tells it from other sides.
        values: (seeds, queries), a single row where nothing is drawn.
        against: the side that it is compared with, of the same queries; None for what others are compared with.
        further: column to number.
    """

    names: Mapping[str, str]
    values: Sequence[Sequence[float]]
    against: Arm | None = None
    further: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Of all seeds and queries."""
        return fmean(self.of_seeds)

    @property
    def of_seeds(self) -> list[float]:
        """Each seed's mean over queries."""
        return [fmean(row) for row in self.values]

    @property
    def of_queries(self) -> list[float]:
        """Each query's mean over seeds."""
        return [fmean(column) for column in zip(*self.values, strict=True)]


@dataclass(frozen=True)
class Compared:
    """A side beside the one it is compared with.

    Attributes:
        deviation: standard deviation of the seeds' means; None of a single seed.
        change: of the mean; None where there is nothing to compare with, as is `p_value`.
        p_value: of a two-sided paired randomisation test over queries, after Holm's correction.
    """

    arm: Arm
    deviation: float | None
    change: float | None
    p_value: float | None


def compare(arms: Sequence[Arm]) -> list[Compared]:
    """Every side beside its own, in order; p-values are corrected for how many are tested here."""
    tested = [arm for arm in arms if arm.against is not None]
    p_values = [paired_p_value(arm.of_queries, arm.against.of_queries) for arm in tested]
    corrected = {id(arm): p_value for arm, p_value in zip(tested, holm(p_values), strict=True)}
    return [
        Compared(
            arm,
            stdev(arm.of_seeds) if len(arm.values) > 1 else None,
            None if arm.against is None else arm.mean - arm.against.mean,
            corrected.get(id(arm)),
        )
        for arm in arms
    ]
