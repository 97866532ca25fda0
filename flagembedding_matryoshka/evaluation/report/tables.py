"""Tables of a report, in Markdown with aligned columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple

from flagembedding_matryoshka.evaluation.calibration import SettingCalibration
from flagembedding_matryoshka.evaluation.comparison import (
    BaselineComparison,
    Choice,
    SettingComparison,
    means,
    milliseconds,
)
from flagembedding_matryoshka.evaluation.fusion import FIRST_STAGE, Difference, FusionResult, Level
from flagembedding_matryoshka.evaluation.runs import QUALITY
from flagembedding_matryoshka.setting import Setting


def settings_table(
    comparisons: Sequence[SettingComparison],
    baselines: Sequence[BaselineComparison],
    chosen: Mapping[float, Setting] | None = None,
) -> str:
    """Tabulate baselines and settings against the full network.

    Args:
        comparisons: the settings.
        baselines: the baselines.
        chosen: setting that a plan chooses for each budget; adds a column.
    """
    measures = list(comparisons[0].result.per_query)
    costs = ["GFLOP/pair", "share", "ms/pair", "pairs/s"]
    rows = [["setting", *measures, "change", "95 %", "p", *costs, "peak MB", "front of", "budget"]]
    for comparison in baselines:
        baseline = comparison.baseline
        name, cost = baseline.name, [baseline.flops_per_pair, comparison.flops_share, baseline.pairs_per_second]
        rows.append([name, *_quality(baseline.per_query), *difference(comparison), *_cost(*cost), "", "", ""])
    for item in comparisons:
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


def choice_table(choices: Sequence[Choice]) -> str:
    """Tabulate the settings that the choosing half chooses, with their values on the held-out half."""
    rows = [["chosen", "operations", "nDCG@10, choosing half", "held-out half", "change", "95 %", "p"]]
    rows += [
        [
            str(item.setting),
            *(f"{share:.3f}" for share in (item.flops_share, item.ndcg_share, item.held_out_share)),
            *difference(item),
        ]
        for item in choices
    ]
    return markdown_table(rows)


def calibration_table(calibrations: Sequence[SettingCalibration]) -> str:
    """Tabulate the errors of each setting's probabilities on the held-out half, a row for each kind of probability."""
    rows = [["setting", "probability", "calibration error", "Brier score", "log loss"]]
    for item in calibrations:
        for name, errors in item.errors.items():
            kind = f"{name}, {item.calibration.method}" if name == "calibrated" else name.replace("_", " ")
            rows.append([str(item.setting), kind, *(f"{value:.4f}" for value in astuple(errors))])
    return markdown_table(rows)


def weights_table(fusion: FusionResult) -> str:
    """Tabulate nDCG@10 on the choosing half for every weight that was tried."""
    tried = fusion.choice.qualities.items()
    rows = [["weight", *(f"{weight:g}" for (weight,), _ in tried)]]
    rows.append([f"{QUALITY}, choosing half", *(f"{quality:.4f}" for _, quality in tried)])
    return markdown_table(rows)


def fusion_table(fusion: FusionResult) -> str:
    """Tabulate each setting on the held-out half: plain, fused, and fused against plain and against the first stage."""
    of_plain = ["change", "95 %", "p"]
    of_first = [f"against {FIRST_STAGE} alone", *of_plain[1:]]
    rows = [["setting", "plain", "fused", "95 %", *of_plain, *of_first]]
    rows.append([f"{FIRST_STAGE} alone", *_level(fusion.first_stage)[:1], *[""] * 8])
    for item in fusion.settings:
        changes = [*difference(item.against_plain), *difference(item.against_first_stage)]
        rows.append([str(item.result.setting), f"{item.plain.mean:.4f}", *_level(item.fused), *changes])
    return markdown_table(rows)


def orders_table(fusion: FusionResult) -> str:
    """Tabulate scorers, alone and fused with each other, on the held-out half."""
    rows = [["order", "weights", "nDCG@10", "95 %", "change", "95 %", "p"]]
    for item in fusion.orders:
        weights = ", ".join(f"{weight:g}" for _, weight in item.order.weights)
        change = ["", "", ""] if item.change is None else difference(item.change)
        rows.append([item.order.baseline.name, weights, *_level(item.held_out), *change])
    return markdown_table(rows)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. The first column is aligned to the left, the others to the right.

    Args:
        rows: cells of the rows, the header first.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{'>' if column else '<'}{widths[column]}}" for column, cell in enumerate(row)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def difference(item: SettingComparison | BaselineComparison | Choice | Difference) -> list[str]:
    """Return cells of the change, its interval and p-value; empty for the full network itself."""
    if item.p_value is None:
        return ["", "", ""]
    interval = "" if item.interval is None else "{:+.4f} to {:+.4f}".format(*item.interval)
    return [f"{item.change:+.4f}", interval, f"{item.p_value:.3f}"]


def _level(level: Level) -> list[str]:
    """Return cells of the mean and its interval."""
    return [f"{level.mean:.4f}", "" if level.interval is None else "{:.4f} to {:.4f}".format(*level.interval)]


def describe_width(setting: Setting) -> str:
    """Return the name of a setting's width."""
    ratio, layers, store = setting.width
    width = "full width" if ratio == 1 else f"ratio {ratio} after {', '.join(map(str, layers))}"
    return f"{width}, passages stored after {store}" if store else width


def fronts(item: SettingComparison) -> str:
    """Return the names of the Pareto fronts that a setting is on."""
    return ", ".join(name for name, on in (("operations", item.on_front), ("time", item.on_time_front)) if on)


def _quality(values: Mapping[str, Sequence[float]]) -> list[str]:
    return [f"{value:.4f}" for value in means(values).values()]


def _cost(flops_per_pair: float | None, share: float | None, pairs_per_second: float | None) -> list[str]:
    if flops_per_pair is None:
        return ["", "", "", ""]
    time = milliseconds(pairs_per_second)
    return [f"{flops_per_pair / 1e9:.4g}", f"{share:.3f}", f"{time:.4g}", f"{pairs_per_second:.4g}"]
