"""Results compared with the full network: as a table, as JSON, and as the plan of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flagembedding_matryoshka.evaluation.baselines import Baseline
from flagembedding_matryoshka.evaluation.metrics import QUALITY, mean
from flagembedding_matryoshka.evaluation.pareto import pareto_front
from flagembedding_matryoshka.evaluation.significance import holm, paired_p_value
from flagembedding_matryoshka.evaluation.store import Result
from flagembedding_matryoshka.inference.plan import Measured
from flagembedding_matryoshka.setting import Setting


@dataclass(frozen=True)
class Compared:
    """A result beside the full network's.

    Attributes:
        change: of nDCG@10, absolute.
        p_value: of that change, corrected for the number of settings and baselines; None for the full network itself.
        flops_share: of the full network's operations.
        on_front: whether no other setting has at least its nDCG@10 for at most its operations, and one of them better.
    """

    result: Result
    change: float
    p_value: float | None
    flops_share: float
    on_front: bool

    def as_json(self) -> dict[str, Any]:
        """All but the values of single queries."""
        costs = ("flops_per_pair", "pairs_per_second", "peak_memory")
        return {
            **asdict(self.result.setting),
            **_means(self.result.per_query),
            f"{QUALITY}_change": self.change,
            "p_value": self.p_value,
            "flops_share": self.flops_share,
            **{name: getattr(self.result, name) for name in costs},
            "on_front": self.on_front,
        }


@dataclass(frozen=True)
class ComparedBaseline:
    """A baseline beside the full network, as in `Compared`; `flops_share` is None where it costs nothing."""

    baseline: Baseline
    change: float
    p_value: float
    flops_share: float | None

    def as_json(self) -> dict[str, Any]:
        """All but the values of single queries."""
        return {
            "name": self.baseline.name,
            **_means(self.baseline.per_query),
            f"{QUALITY}_change": self.change,
            "p_value": self.p_value,
            "flops_share": self.flops_share,
            "flops_per_pair": self.baseline.flops_per_pair,
            "pairs_per_second": self.baseline.pairs_per_second,
        }


def compare(
    results: Sequence[Result], full: Setting, baselines: Sequence[Baseline] = ()
) -> tuple[list[Compared], list[ComparedBaseline]]:
    """Results and baselines beside the full network's result, in order.

    p-values are of a paired randomisation test, after Holm for all of them together.
    """
    (reference,) = (result for result in results if result.setting == full)
    others = [result for result in results if result is not reference]
    reached = reference.per_query[QUALITY]
    per_query = [item.per_query for item in others] + [item.per_query for item in baselines]
    tested = holm([paired_p_value(values[QUALITY], reached) for values in per_query])
    p_values = {result.setting: p_value for result, p_value in zip(others, tested, strict=False)}
    front = pareto_front([(result.flops_per_pair, result.mean(QUALITY)) for result in results])
    compared = [
        Compared(
            result,
            result.mean(QUALITY) - mean(reached),
            p_values.get(result.setting),
            result.flops_per_pair / reference.flops_per_pair,
            on_front,
        )
        for result, on_front in zip(results, front, strict=True)
    ]
    beside = [
        ComparedBaseline(
            baseline,
            mean(baseline.per_query[QUALITY]) - mean(reached),
            p_value,
            None if baseline.flops_per_pair is None else baseline.flops_per_pair / reference.flops_per_pair,
        )
        for baseline, p_value in zip(baselines, tested[len(others) :], strict=True)
    ]
    return compared, beside


def measured(compared: Sequence[Compared], full: Setting) -> tuple[Measured, ...]:
    """Settings as a plan holds them.

    Raises:
        ValueError: if the full network finds nothing, so that there is no share of what it finds.
    """
    (reference,) = (item.result.mean(QUALITY) for item in compared if item.result.setting == full)
    if not reference:
        raise ValueError(f"the full network's {QUALITY} is 0 on this data: a plan holds shares of it")
    return tuple(
        Measured(item.result.setting, item.flops_share, item.result.mean(QUALITY) / reference) for item in compared
    )


def table(
    compared: Sequence[Compared], baselines: Sequence[ComparedBaseline], chosen: Mapping[float, Setting] | None = None
) -> str:
    """A Markdown table, legible as it is.

    Args:
        chosen: budgets, and what a plan chose for each: a column of its own.
    """
    measures = list(compared[0].result.per_query)
    rows = [["setting", *measures, "change", "p", "GFLOP/pair", "share", "pairs/s", "peak MB", "front", "budget"]]
    for beside in baselines:
        baseline = beside.baseline
        name, cost = baseline.name, [baseline.flops_per_pair, beside.flops_share, baseline.pairs_per_second]
        rows.append([name, *_quality(baseline.per_query, beside.change, beside.p_value), *_cost(*cost), "", "", ""])
    for item in compared:
        result = item.result
        budgets = [f"{budget:g}" for budget, setting in (chosen or {}).items() if setting == result.setting]
        rows.append(
            [
                str(result.setting),
                *_quality(result.per_query, item.change, item.p_value),
                *_cost(result.flops_per_pair, item.flops_share, result.pairs_per_second),
                "" if result.peak_memory is None else f"{result.peak_memory / 1e6:.0f}",
                "yes" if item.on_front else "",
                ", ".join(budgets),
            ]
        )
    if not chosen:
        rows = [row[:-1] for row in rows]
    return markdown_table(rows)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first, in columns of even width: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{'>' if place else '<'}{widths[place]}}" for place, cell in enumerate(row)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + (":" if place else "-") for place, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {measure: mean(of_queries) for measure, of_queries in values.items()}


def _quality(values: Mapping[str, Sequence[float]], change: float, p_value: float | None) -> list[str]:
    """Cells of the measures and of the change, which is that of another than the full network if it has a p-value."""
    differs = ["", ""] if p_value is None else [f"{change:+.4f}", f"{p_value:.3f}"]
    return [*(f"{value:.4f}" for value in _means(values).values()), *differs]


def _cost(flops_per_pair: float | None, share: float | None, pairs_per_second: float | None) -> list[str]:
    if flops_per_pair is None:
        return ["", "", ""]
    return [f"{flops_per_pair / 1e9:.4g}", f"{share:.3f}", f"{pairs_per_second:.4g}"]
