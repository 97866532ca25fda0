"""A report as Markdown tables, legible as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flagembedding_matryoshka.evaluation.calibration import Calibrated
from flagembedding_matryoshka.evaluation.choice import Chosen
from flagembedding_matryoshka.evaluation.fusion import FIRST_STAGE, Difference, FusionReport, Level
from flagembedding_matryoshka.evaluation.metrics import QUALITY
from flagembedding_matryoshka.evaluation.report import Compared, ComparedBaseline, means, milliseconds
from flagembedding_matryoshka.setting import Setting


def table(
    compared: Sequence[Compared], baselines: Sequence[ComparedBaseline], chosen: Mapping[float, Setting] | None = None
) -> str:
    """Baselines and settings beside the full network.

    Args:
        chosen: budgets, and what a plan chose for each: a column of its own.
    """
    measures = list(compared[0].result.per_query)
    costs = ["GFLOP/pair", "share", "ms/pair", "pairs/s"]
    rows = [["setting", *measures, "change", "95 %", "p", *costs, "peak MB", "front of", "budget"]]
    for beside in baselines:
        baseline = beside.baseline
        name, cost = baseline.name, [baseline.flops_per_pair, beside.flops_share, baseline.pairs_per_second]
        rows.append([name, *_quality(baseline.per_query), *difference(beside), *_cost(*cost), "", "", ""])
    for item in compared:
        result = item.result
        budgets = [f"{budget:g}" for budget, setting in (chosen or {}).items() if setting == result.setting]
        rows.append(
            [
                str(result.setting),
                *_quality(result.per_query),
                *difference(item),
                *_cost(result.flops_per_pair, item.flops_share, result.pairs_per_second),
                "" if result.peak_memory is None else f"{result.peak_memory / 1e6:.0f}",
                fronts(item),
                ", ".join(budgets),
            ]
        )
    if not chosen:
        rows = [row[:-1] for row in rows]
    return markdown_table(rows)


def choice_table(chosen: Sequence[Chosen]) -> str:
    """What one half of the queries chooses, reported on the other."""
    rows = [["chosen", "operations", "nDCG@10 where chosen", "held out", "change", "95 %", "p"]]
    rows += [
        [
            str(item.setting),
            *(f"{share:.3f}" for share in (item.flops_share, item.ndcg_share, item.held_out_share)),
            *difference(item),
        ]
        for item in chosen
    ]
    return markdown_table(rows)


def calibration_table(calibrated: Sequence[Calibrated]) -> str:
    """Expected calibration error of each setting on the held-out half."""
    rows = [["setting", "sigmoid", "calibrated", "method"]]
    rows += [
        [str(item.setting), f"{item.before:.4f}", f"{item.after:.4f}", item.calibration.method] for item in calibrated
    ]
    return markdown_table(rows)


def weights_table(fusion: FusionReport) -> str:
    """Tabulate nDCG@10 on the choosing half for every weight that was tried."""
    tried = fusion.choice.qualities.items()
    rows = [["weight", *(f"{weight:g}" for (weight,), _ in tried)]]
    rows.append([f"{QUALITY} where chosen", *(f"{quality:.4f}" for _, quality in tried)])
    return markdown_table(rows)


def fusion_table(fusion: FusionReport) -> str:
    """Tabulate each setting on the held-out half: plain, fused, and fused against plain and against the first stage."""
    of_plain = ["change", "95 %", "p"]
    of_first = [f"against {FIRST_STAGE} alone", *of_plain[1:]]
    rows = [["setting", "plain", "fused", "95 %", *of_plain, *of_first]]
    rows.append([f"{FIRST_STAGE} alone", *_level(fusion.first_stage)[:1], *[""] * 8])
    for item in fusion.settings:
        changes = [*difference(item.against_plain), *difference(item.against_first_stage)]
        rows.append([str(item.result.setting), f"{item.plain.mean:.4f}", *_level(item.fused), *changes])
    return markdown_table(rows)


def orders_table(fusion: FusionReport) -> str:
    """Tabulate scorers, alone and fused with each other, on the held-out half."""
    rows = [["order", "weights", "nDCG@10", "95 %", "change", "95 %", "p"]]
    for item in fusion.orders:
        weights = ", ".join(f"{weight:g}" for _, weight in item.order.weights)
        change = ["", "", ""] if item.change is None else difference(item.change)
        rows.append([item.order.baseline.name, weights, *_level(item.held_out), *change])
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


def difference(item: Compared | ComparedBaseline | Chosen | Difference) -> list[str]:
    """Cells of the change, its interval and p-value; empty for the full network itself."""
    if item.p_value is None:
        return ["", "", ""]
    interval = "" if item.interval is None else "{:+.4f} to {:+.4f}".format(*item.interval)
    return [f"{item.change:+.4f}", interval, f"{item.p_value:.3f}"]


def _level(level: Level) -> list[str]:
    """Return cells of the mean and its interval."""
    return [f"{level.mean:.4f}", "" if level.interval is None else "{:.4f} to {:.4f}".format(*level.interval)]


def fronts(item: Compared) -> str:
    """Of which Pareto fronts a setting is."""
    return ", ".join(name for name, on in (("operations", item.on_front), ("time", item.on_time_front)) if on)


def _quality(values: Mapping[str, Sequence[float]]) -> list[str]:
    return [f"{value:.4f}" for value in means(values).values()]


def _cost(flops_per_pair: float | None, share: float | None, pairs_per_second: float | None) -> list[str]:
    if flops_per_pair is None:
        return ["", "", "", ""]
    time = milliseconds(pairs_per_second)
    return [f"{flops_per_pair / 1e9:.4g}", f"{share:.3f}", f"{time:.4g}", f"{pairs_per_second:.4g}"]
