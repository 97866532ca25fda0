"""Plot of quality against cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.evaluation.comparison import SettingComparison, milliseconds
from flagembedding_matryoshka.evaluation.fusion import FusionComparison
from flagembedding_matryoshka.evaluation.report.report import Report
from flagembedding_matryoshka.evaluation.report.tables import describe_width
from flagembedding_matryoshka.evaluation.runs import QUALITY, mean
from flagembedding_matryoshka.files import replacing
from flagembedding_matryoshka.setting import Setting

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("the plot needs matplotlib: pip install flagembedding_matryoshka[evaluation]") from error

MARKERS = "osD^"


def plot(report: Report, title: str, path: Path) -> None:
    """Draw nDCG@10 against operations and against measured time.

    Each width is a line, each exit a point with its number, each cascade a star. A thick line in the background is the
    Pareto front. Fused settings are hollow, on dashed lines. A baseline is a cross, or a level if it has no cost.

    Args:
        report: the report.
        title: title of the figure.
        path: the PNG file to write.
    """
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    by_operations, by_time = figure.subplots(1, 2, sharey=True)
    _draw(
        *(by_operations, report),
        cost=lambda item: None if item.flops_per_pair is None else item.flops_per_pair / 1e9,
        front=[item.on_front for item in report.settings],
    )
    _draw(
        *(by_time, report),
        cost=lambda item: milliseconds(item.pairs_per_second),
        front=[item.on_time_front for item in report.settings],
    )
    by_operations.set(xlabel="GFLOP per pair", ylabel=QUALITY)
    by_time.set(xlabel="milliseconds per pair, as measured")
    by_operations.legend(fontsize=8, loc="best")
    figure.suptitle(title)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _draw(
    axes: Axes,
    report: Report,
    cost: Callable[..., Any],
    front: Sequence[bool],
) -> None:
    """Draw one panel.

    Args:
        axes: the panel.
        report: the report.
        cost: returns the cost of a result or a baseline, None if it has none.
        front: for each setting, True if it is on the panel's Pareto front.
    """
    points = _points(report.settings, cost)
    fused = {} if report.fusion is None else _points(report.fusion.settings, cost)
    best = sorted(
        points[item.result.setting] for item, on_front in zip(report.settings, front, strict=True) if on_front
    )
    axes.step(*zip(*best, strict=True), where="post", color="gold", lw=5, alpha=0.5, zorder=1, label="Pareto front")
    widths = dict.fromkeys((setting.compress_layers, setting.compress_ratio) for setting in points)
    for number, (after, ratio) in enumerate(widths):
        mine = [setting for setting in points if (setting.compress_layers, setting.compress_ratio) == (after, ratio)]
        exits = [setting for setting in mine if not setting.cascade]
        label = describe_width(after, ratio)
        marker = MARKERS[number % len(MARKERS)]
        (line,) = axes.plot(
            *zip(*(points[setting] for setting in exits), strict=True), marker=marker, ms=5, lw=1.2, label=label
        )
        cascades = [setting for setting in mine if setting.cascade]
        if cascades:
            stars = zip(*(points[setting] for setting in cascades), strict=True)
            axes.plot(*stars, "*", ms=12, mec="black", mew=0.5, color=line.get_color(), label=f"cascade, {label}")
        if fused:
            color = line.get_color()
            line_points = zip(*(fused[setting] for setting in exits), strict=True)
            axes.plot(
                *line_points, ls="--", marker=marker, ms=5, lw=1.2, mfc="white", color=color, label=f"fused, {label}"
            )
            for setting in cascades:
                axes.plot(*fused[setting], "*", ms=12, mfc="white", color=color)
        for setting in mine:
            stages = "".join(f"{layer}:{share:g}→" for layer, share in setting.cascade)
            axes.annotate(
                f"{stages}{setting.depth}",
                points[setting],
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    for baseline in (item.baseline for item in report.baselines):
        quality, value = mean(baseline.per_query[QUALITY]), cost(baseline)
        if value is None:
            axes.axhline(quality, color="grey", lw=0.8, ls="--")
            axes.annotate(
                baseline.name, (1, quality), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey"
            )
        else:
            axes.plot(value, quality, "X", color="grey", ms=8, label=baseline.name)
    orders = [] if report.fusion is None else [item.order for item in report.fusion.orders]
    for order in orders:
        if order.weights and not order.is_reference:
            quality = mean(order.baseline.per_query[QUALITY])
            marker = "P" if len(order.weights) > 1 else "X"
            axes.plot(cost(order.baseline), quality, marker, color="grey", mfc="white", ms=8, label=order.baseline.name)
    axes.set_xlim(left=0)
    axes.margins(y=0.12)


def _points(
    items: Sequence[SettingComparison] | Sequence[FusionComparison], cost: Callable[..., Any]
) -> dict[Setting, tuple[float, float]]:
    """Return cost and nDCG@10 of each setting."""
    return {item.result.setting: (cost(item.result), item.result.mean(QUALITY)) for item in items}
