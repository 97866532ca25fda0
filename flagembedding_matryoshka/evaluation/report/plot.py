"""Charts of quality against cost, by matplotlib: a picture, and SVG for the HTML page."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from flagembedding_matryoshka.evaluation.comparison import SettingComparison, milliseconds
from flagembedding_matryoshka.evaluation.fusion import FusionComparison
from flagembedding_matryoshka.evaluation.report.report import FUSED, ORDERS, SETTINGS, Report
from flagembedding_matryoshka.evaluation.report.tables import describe_width
from flagembedding_matryoshka.evaluation.runs import QUALITY, mean
from flagembedding_matryoshka.files import replacing
from flagembedding_matryoshka.setting import Setting

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("the plot needs matplotlib: pip install flagembedding_matryoshka[evaluation]") from error

MARKERS = "osD^"
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Panel(NamedTuple):
    """A chart.

    Attributes:
        label: label of the axis of costs.
        cost: returns the cost of a result or a baseline, None if it has none.
        on_front: returns True for a setting on the chart's Pareto front.
    """

    label: str
    cost: Callable[..., Any]
    on_front: Callable[[SettingComparison], bool]


PANELS = (
    Panel(
        "GFLOP per pair",
        lambda item: None if item.flops_per_pair is None else item.flops_per_pair / 1e9,
        lambda item: item.on_front,
    ),
    Panel(
        "milliseconds per pair, as measured",
        lambda item: milliseconds(item.pairs_per_second),
        lambda item: item.on_time_front,
    ),
)


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
    for axes, panel in zip((by_operations, by_time), PANELS, strict=True):
        _draw(axes, report, panel)
    by_operations.set(ylabel=QUALITY)
    by_operations.legend(fontsize=8, loc="best")
    figure.suptitle(title)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def svg_charts(report: Report, labels: Mapping[str, str], prefix: str) -> list[str]:
    """Draw each chart of `plot` as an `<svg>` of its own, whose points have a text and can be focused.

    Args:
        report: the report.
        labels: text of each point, by the id of its row in a table.
        prefix: prefix of the ids of rows in the page.
    """
    charts = []
    for number, panel in enumerate(PANELS):
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        axes = figure.subplots()
        _draw(axes, report, panel)
        axes.set(ylabel=QUALITY)
        axes.legend(fontsize=8, loc="best", frameon=False)
        text = StringIO()
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{prefix}{number}"}):
            figure.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)
        charts.append(_inline(text.getvalue(), labels, prefix, f"{QUALITY} by {panel.label}"))
    return charts


def _inline(svg: str, labels: Mapping[str, str], prefix: str, title: str) -> str:
    """Return matplotlib's SVG as an element of a page, and make its groups named in `labels` points."""

    def group(found: re.Match[str]) -> str:
        if (row := found[1]) not in labels:
            return "<g>"
        text = escape(labels[row])
        point = f'class="point" tabindex="0" role="img" aria-label="{text}" data-row="{prefix}{row}"'
        return f"<g {point}><title>{text}</title>"

    _, viewbox, content = re.split(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', svg, maxsplit=1)
    content = re.sub(r'<g id="([^"]*)">', group, content)
    return f'<svg {viewbox} role="group" aria-label="{escape(title)}">{content}'


def _draw(axes: Axes, report: Report, panel: Panel) -> None:
    """Draw a chart. A transparent circle around each point has the id of its row, in the order of costs."""
    cost = panel.cost
    points = _points(report.settings, cost)
    fused = {} if report.fusion is None else _points(report.fusion.settings, cost)
    rows = {f"{SETTINGS}{row}": point for row, point in enumerate(points.values(), len(report.baselines))}
    rows |= {f"{FUSED}{row}": point for row, point in enumerate(fused.values(), 1)}  # row 0 is the first stage
    best = sorted(points[item.result.setting] for item in report.settings if panel.on_front(item))
    axes.step(*zip(*best, strict=True), where="post", color="gold", lw=5, alpha=0.5, zorder=1, label="Pareto front")
    for number, width in enumerate(dict.fromkeys(setting.width for setting in points)):
        mine = [setting for setting in points if setting.width == width]
        exits = [setting for setting in mine if not setting.cascade]
        label = describe_width(mine[0])
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
    for row, baseline in enumerate(item.baseline for item in report.baselines):
        quality, value = mean(baseline.per_query[QUALITY]), cost(baseline)
        if value is None:
            axes.axhline(quality, color="grey", lw=0.8, ls="--")
            axes.annotate(
                baseline.name, (1, quality), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey"
            )
        else:
            axes.plot(value, quality, "X", color="grey", ms=8, label=baseline.name)
            rows[f"{SETTINGS}{row}"] = value, quality
    orders = [] if report.fusion is None else [item.order for item in report.fusion.orders]
    for row, order in enumerate(orders):
        if order.weights and not order.is_reference:
            quality = mean(order.baseline.per_query[QUALITY])
            marker = "P" if len(order.weights) > 1 else "X"
            axes.plot(cost(order.baseline), quality, marker, color="grey", mfc="white", ms=8, label=order.baseline.name)
            rows[f"{ORDERS}{row}"] = cost(order.baseline), quality
    for name, point in sorted(rows.items(), key=lambda item: item[1]):
        axes.scatter(*point, s=120, color=(0, 0, 0, 0), zorder=3, gid=name)
    axes.set(xlabel=panel.label)
    axes.set_xlim(left=0)
    axes.margins(y=0.12)


def _points(
    items: Sequence[SettingComparison] | Sequence[FusionComparison], cost: Callable[..., Any]
) -> dict[Setting, tuple[float, float]]:
    """Return cost and nDCG@10 of each setting."""
    return {item.result.setting: (cost(item.result), item.result.mean(QUALITY)) for item in items}
