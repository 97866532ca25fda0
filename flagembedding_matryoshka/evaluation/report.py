"""Results compared with the full network: as a table, as JSON, and as the plan of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flagembedding_matryoshka.evaluation.metrics import QUALITY, mean
from flagembedding_matryoshka.evaluation.pareto import pareto_front
from flagembedding_matryoshka.evaluation.significance import holm, paired_p_value
from flagembedding_matryoshka.evaluation.store import Result
from flagembedding_matryoshka.plan import Measured, Setting


@dataclass(frozen=True)
class Compared:
    """A result beside the full network's.

    Attributes:
        change: of nDCG@10, absolute.
        p_value: of that change, corrected for the number of settings; None for the full network itself.
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
        measures = {name: self.result.mean(name) for name in self.result.per_query}
        costs = ("flops_per_pair", "pairs_per_second", "peak_memory")
        return {
            **asdict(self.result.setting),
            **measures,
            f"{QUALITY}_change": self.change,
            "p_value": self.p_value,
            "flops_share": self.flops_share,
            **{name: getattr(self.result, name) for name in costs},
            "on_front": self.on_front,
        }


def compare(results: Sequence[Result], full: Setting) -> list[Compared]:
    """Every result beside the full network's, in order; p-values are of a paired randomisation test, after Holm."""
    (reference,) = (result for result in results if result.setting == full)
    others = [result for result in results if result is not reference]
    tested = [paired_p_value(result.per_query[QUALITY], reference.per_query[QUALITY]) for result in others]
    p_values = {result.setting: p_value for result, p_value in zip(others, holm(tested), strict=True)}
    front = pareto_front([(result.flops_per_pair, result.mean(QUALITY)) for result in results])
    return [
        Compared(
            result,
            result.mean(QUALITY) - reference.mean(QUALITY),
            p_values.get(result.setting),
            result.flops_per_pair / reference.flops_per_pair,
            on_front,
        )
        for result, on_front in zip(results, front, strict=True)
    ]


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


def table(compared: Sequence[Compared], given: dict[str, list[float]]) -> str:
    """A Markdown table, legible as it is.

    Args:
        given: the measures of the candidates' own order, query by query.
    """
    measures = list(given)
    rows = [["setting", *measures, "change", "p", "GFLOP/pair", "share", "pairs/s", "peak MB", "front"]]
    rows.append(["candidates as given", *(f"{mean(given[name]):.4f}" for name in measures), *[""] * 7])
    for item in compared:
        result = item.result
        rows.append(
            [
                str(result.setting),
                *(f"{result.mean(name):.4f}" for name in measures),
                "" if item.p_value is None else f"{item.change:+.4f}",
                "" if item.p_value is None else f"{item.p_value:.3f}",
                f"{result.flops_per_pair / 1e9:.4g}",
                f"{item.flops_share:.3f}",
                f"{result.pairs_per_second:.4g}",
                "" if result.peak_memory is None else f"{result.peak_memory / 1e6:.0f}",
                "yes" if item.on_front else "",
            ]
        )
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
