"""Sides of a comparison, and the significance of their differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from flagembedding_matryoshka.evaluation.significance import holm, paired_p_value


@dataclass(frozen=True, eq=False)
class Arm:
    """One side of a comparison: a row of a table.

    Attributes:
        names: the cells that identify the side, by column.
        values: (seeds, queries); a single row if nothing is drawn.
        against: the reference side, over the same queries; None for a reference.
        further: further numbers, by column.
    """

    names: Mapping[str, str]
    values: Sequence[Sequence[float]]
    against: Arm | None = None
    further: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean over all seeds and queries."""
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
class Comparison:
    """A side and its difference to its reference.

    Attributes:
        deviation: standard deviation of the seeds' means; None for a single seed.
        change: difference of the means; None for a reference.
        p_value: p-value of a two-sided paired randomisation test over queries, after Holm's correction; None for a
            reference.
    """

    arm: Arm
    deviation: float | None
    change: float | None
    p_value: float | None


def compare(arms: Sequence[Arm]) -> list[Comparison]:
    """Compare each side with its reference. P-values are corrected for the number of tests."""
    tested = [arm for arm in arms if arm.against is not None]
    p_values = [paired_p_value(arm.of_queries, arm.against.of_queries) for arm in tested]
    corrected = {id(arm): p_value for arm, p_value in zip(tested, holm(p_values), strict=True)}
    return [
        Comparison(
            arm,
            stdev(arm.of_seeds) if len(arm.values) > 1 else None,
            None if arm.against is None else arm.mean - arm.against.mean,
            corrected.get(id(arm)),
        )
        for arm in arms
    ]
