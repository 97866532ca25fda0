"""Results compared with the full network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flagembedding_matryoshka.evaluation.baselines import Baseline
from flagembedding_matryoshka.evaluation.metrics import QUALITY, mean
from flagembedding_matryoshka.evaluation.pareto import pareto_front
from flagembedding_matryoshka.evaluation.significance import holm, paired_interval, paired_p_value
from flagembedding_matryoshka.evaluation.store import Result
from flagembedding_matryoshka.setting import Setting


@dataclass(frozen=True)
class Compared:
    """A result beside the full network's.

    Attributes:
        change: of nDCG@10, absolute.
        interval: of that change, 95 % confidence; None for the full network itself, and of a single query.
        p_value: of that change, corrected for the number of settings and baselines; None for the full network itself.
        flops_share: of the full network's operations.
        on_front: whether no other setting has at least its nDCG@10 for at most its operations, and one of them better.
        on_time_front: the same for the time of the sample that was timed.
    """

    result: Result
    change: float
    interval: tuple[float, float] | None
    p_value: float | None
    flops_share: float
    on_front: bool
    on_time_front: bool

    def as_json(self) -> dict[str, Any]:
        """All but the values of single queries."""
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
class ComparedBaseline:
    """A baseline beside the full network, as in `Compared`; `flops_share` is None where it costs nothing."""

    baseline: Baseline
    change: float
    interval: tuple[float, float] | None
    p_value: float
    flops_share: float | None

    def as_json(self) -> dict[str, Any]:
        """All but the values of single queries."""
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
) -> tuple[list[Compared], list[ComparedBaseline]]:
    """Results and baselines beside the full network's result, in order.

    p-values are of a paired randomisation test, after Holm for all of them together; intervals of a paired bootstrap.
    """
    (reference,) = (result for result in results if result.setting == full)
    others = [result for result in results if result is not reference]
    reached = reference.per_query[QUALITY]
    per_query = [item.per_query for item in others] + [item.per_query for item in baselines]
    tested = holm([paired_p_value(values[QUALITY], reached) for values in per_query])
    p_values = {result.setting: p_value for result, p_value in zip(others, tested, strict=False)}
    front = pareto_front([(result.flops_per_pair, result.mean(QUALITY)) for result in results])
    time_front = pareto_front([(1 / result.pairs_per_second, result.mean(QUALITY)) for result in results])
    compared = [
        Compared(
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
    beside = [
        ComparedBaseline(
            baseline,
            mean(baseline.per_query[QUALITY]) - mean(reached),
            paired_interval(baseline.per_query[QUALITY], reached),
            p_value,
            None if baseline.flops_per_pair is None else baseline.flops_per_pair / reference.flops_per_pair,
        )
        for baseline, p_value in zip(baselines, tested[len(others) :], strict=True)
    ]
    return compared, beside


def means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of each measure, over queries."""
    return {measure: mean(of_queries) for measure, of_queries in values.items()}


def milliseconds(pairs_per_second: float | None) -> float | None:
    """Of a pair, as measured; None of what costs nothing."""
    return None if pairs_per_second is None else 1000 / pairs_per_second
