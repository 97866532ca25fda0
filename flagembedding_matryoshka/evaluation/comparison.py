"""Comparison of settings and baselines with the full network, Pareto fronts, and the choice for a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flagembedding_matryoshka.evaluation.baselines import Baseline
from flagembedding_matryoshka.evaluation.candidates import Halves, take
from flagembedding_matryoshka.evaluation.results import Result
from flagembedding_matryoshka.evaluation.runs import QUALITY, mean
from flagembedding_matryoshka.evaluation.significance import holm, paired_interval, paired_p_value
from flagembedding_matryoshka.inference.calibration import Calibration
from flagembedding_matryoshka.inference.plan import Measurement
from flagembedding_matryoshka.setting import Setting


@dataclass(frozen=True)
class SettingComparison:
    """A setting's result against the full network's.

    Attributes:
        result: the setting's result.
        change: difference of nDCG@10.
        interval: 95 % confidence interval of the difference; None for the full network itself and for a single query.
        p_value: p-value of the difference, with Holm's correction for all settings and baselines; None for the full
            network itself.
        flops_share: operations relative to the full network's.
        on_front: True if the setting is Pareto-optimal in nDCG@10 and operations.
        on_time_front: True if it is Pareto-optimal in nDCG@10 and measured time.
    """

    result: Result
    change: float
    interval: tuple[float, float] | None
    p_value: float | None
    flops_share: float
    on_front: bool
    on_time_front: bool

    def as_json(self) -> dict[str, Any]:
        """Return JSON values, without the values of single queries."""
        costs = ("flops_per_pair", "pairs_per_second", "peak_memory")
        return {
            **asdict(self.result.setting),
            **means(self.result.per_query),
            f"{QUALITY}_change": self.change,
            f"{QUALITY}_change_95": self.interval,
            "p_value": self.p_value,
            "flops_share": self.flops_share,
            **{name: getattr(self.result, name) for name in costs},
            "milliseconds_per_pair": milliseconds(self.result.pairs_per_second),
            "on_front": self.on_front,
            "on_time_front": self.on_time_front,
        }


@dataclass(frozen=True)
class BaselineComparison:
    """A baseline against the full network, as `SettingComparison`. `flops_share` is None without a cost."""

    baseline: Baseline
    change: float
    interval: tuple[float, float] | None
    p_value: float
    flops_share: float | None

    def as_json(self) -> dict[str, Any]:
        """Return JSON values, without the values of single queries."""
        return {
            "name": self.baseline.name,
            **means(self.baseline.per_query),
            f"{QUALITY}_change": self.change,
            f"{QUALITY}_change_95": self.interval,
            "p_value": self.p_value,
            "flops_share": self.flops_share,
            "flops_per_pair": self.baseline.flops_per_pair,
            "pairs_per_second": self.baseline.pairs_per_second,
            "milliseconds_per_pair": milliseconds(self.baseline.pairs_per_second),
        }


def compare(
    results: Sequence[Result], full: Setting, baselines: Sequence[Baseline] = ()
) -> tuple[list[SettingComparison], list[BaselineComparison]]:
    """Compare results and baselines with the full network's result; the order is kept.

    p-values are those of a paired randomisation test, with Holm's correction for all of them together. Intervals are
    those of a paired bootstrap.
    """
    (reference,) = (result for result in results if result.setting == full)
    others = [result for result in results if result is not reference]
    reached = reference.per_query[QUALITY]
    per_query = [item.per_query for item in others] + [item.per_query for item in baselines]
    tested = holm([paired_p_value(values[QUALITY], reached) for values in per_query])
    p_values = {result.setting: p_value for result, p_value in zip(others, tested, strict=False)}
    front = pareto_front([(result.flops_per_pair, result.mean(QUALITY)) for result in results])
    time_front = pareto_front([(1 / result.pairs_per_second, result.mean(QUALITY)) for result in results])
    comparisons = [
        SettingComparison(
            result,
            result.mean(QUALITY) - mean(reached),
            None if result is reference else paired_interval(result.per_query[QUALITY], reached),
            p_values.get(result.setting),
            result.flops_per_pair / reference.flops_per_pair,
            on_front,
            on_time_front,
        )
        for result, on_front, on_time_front in zip(results, front, time_front, strict=True)
    ]
    baseline_comparisons = [
        BaselineComparison(
            baseline,
            mean(baseline.per_query[QUALITY]) - mean(reached),
            paired_interval(baseline.per_query[QUALITY], reached),
            p_value,
            None if baseline.flops_per_pair is None else baseline.flops_per_pair / reference.flops_per_pair,
        )
        for baseline, p_value in zip(baselines, tested[len(others) :], strict=True)
    ]
    return comparisons, baseline_comparisons


def means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the mean of each measure over queries."""
    return {measure: mean(of_queries) for measure, of_queries in values.items()}


def milliseconds(pairs_per_second: float | None) -> float | None:
    """Return the time of a pair in milliseconds; None without a cost."""
    return None if pairs_per_second is None else 1000 / pairs_per_second


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return, for each (cost, quality), True if it is Pareto-optimal.

    A point is not Pareto-optimal if another point has at most its cost and at least its quality, and is better in one
    of them.
    """
    on_front = [False] * len(points)
    last = (0.0, -math.inf)
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if points[index][1] > last[1] or points[index] == last:
            on_front[index], last = True, points[index]
    return on_front


@dataclass(frozen=True)
class Choice:
    """A setting that is Pareto-optimal on the choosing half, in nDCG@10 and operations.

    Attributes:
        setting: the setting.
        flops_share: operations relative to the full network's, on all queries.
        ndcg_share: nDCG@10 relative to the full network's, on the choosing half.
        held_out_share: the same on the held-out half.
        change: difference of nDCG@10 to the full network's, on the held-out half.
        interval, p_value: of the difference, as in `SettingComparison`; None for the full network itself.
    """

    setting: Setting
    flops_share: float
    ndcg_share: float
    held_out_share: float
    change: float
    interval: tuple[float, float] | None
    p_value: float | None

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self.setting) | {name: value for name, value in vars(self).items() if name != "setting"}


def has_quality_in_both(results: Sequence[Result], full: Setting, halves: Halves) -> bool:
    """Return whether the full network's nDCG@10 is above 0 in each half, so that relative values exist."""
    (reference,) = (result for result in results if result.setting == full)
    return all(any(take(reference.per_query[QUALITY], indices)) for indices in (halves.choosing, halves.held_out))


def plan_settings(
    results: Sequence[Result], full: Setting, halves: Halves, calibrations: Mapping[Setting, Calibration] | None = None
) -> tuple[Measurement, ...]:
    """Return the settings of a plan, with shares of nDCG@10 on the choosing half and on the held-out half.

    Args:
        results: results of the settings.
        full: the deepest exit at full width.
        halves: the halves of the queries.
        calibrations: calibrations of the settings; None is none.

    Raises:
        ValueError: if the full network's nDCG@10 is 0 on a half.
    """
    (reference,) = (result for result in results if result.setting == full)

    def shares(name: str, indices: Sequence[int]) -> list[float]:
        reached = mean(take(reference.per_query[QUALITY], indices))
        if not reached:
            raise ValueError(
                f"the full network's {QUALITY} is 0 on the {len(indices)} {name} queries, but a plan has quality "
                "relative to it: use more queries"
            )
        return [mean(take(result.per_query[QUALITY], indices)) / reached for result in results]

    return tuple(
        Measurement(
            result.setting,
            result.flops_per_pair / reference.flops_per_pair,
            chosen_by,
            held_out,
            (calibrations or {}).get(result.setting),
        )
        for result, chosen_by, held_out in zip(
            results, shares("choosing", halves.choosing), shares("held-out", halves.held_out), strict=True
        )
    )


def choose_settings(results: Sequence[Result], full: Setting, halves: Halves) -> list[Choice]:
    """Return the settings on the choosing half's Pareto front, cheapest first, with their values on the held-out half.

    p-values are those of a paired randomisation test, with Holm's correction for the front.

    Raises:
        ValueError: as `plan_settings`.
    """
    settings = plan_settings(results, full, halves)
    front = pareto_front([(item.flops_share, item.ndcg_share) for item in settings])
    picked = sorted(
        (pair for pair, on_front in zip(zip(settings, results, strict=True), front, strict=True) if on_front),
        key=lambda pair: pair[0].flops_share,
    )
    (reference,) = (result for result in results if result.setting == full)
    reached = take(reference.per_query[QUALITY], halves.held_out)
    held_out = [take(result.per_query[QUALITY], halves.held_out) for _, result in picked]
    others = [values for (item, _), values in zip(picked, held_out, strict=True) if item.setting != full]
    p_values = iter(holm([paired_p_value(values, reached) for values in others]))
    return [
        Choice(
            item.setting,
            item.flops_share,
            item.ndcg_share,
            mean(values) / mean(reached),
            mean(values) - mean(reached),
            None if item.setting == full else paired_interval(values, reached),
            None if item.setting == full else next(p_values),
        )
        for (item, _), values in zip(picked, held_out, strict=True)
    ]
