"""The report as one HTML file with interactive charts. It loads nothing, so it works offline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template

from flagembedding_matryoshka.evaluation.baselines import Baseline
from flagembedding_matryoshka.evaluation.comparison import BaselineComparison, SettingComparison, milliseconds
from flagembedding_matryoshka.evaluation.fusion import FusionResult
from flagembedding_matryoshka.evaluation.report.report import FUSED, ORDERS, SETTINGS, Report
from flagembedding_matryoshka.evaluation.report.tables import describe_width, difference
from flagembedding_matryoshka.evaluation.results import Result
from flagembedding_matryoshka.evaluation.runs import QUALITY, mean
from flagembedding_matryoshka.setting import Setting

TEMPLATE = "page.html"
Width = tuple[tuple[int, ...], int]
"""Compress layers and ratio of a setting."""
WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 44
TICKS = 5
"""Number of ticks of an axis, about."""


def page(name: str, reports: Sequence[Report], first_stages: str | None, chosen: Mapping[float, Setting]) -> str:
    """Return the HTML file.

    Args:
        name: name of the collection.
        reports: a report for each first stage.
        first_stages: a Markdown table of all first stages; None for a single first stage.
        chosen: setting that the model's own plan chooses for each budget.
    """
    body = [] if first_stages is None else [html_table(first_stages)]
    body += [_section(report, f"s{number}", chosen) for number, report in enumerate(reports)]
    template = files("flagembedding_matryoshka.evaluation.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(f"Quality and cost: {name}"), body="\n".join(body))


def html_table(markdown: str, mark: str = "") -> str:
    """Convert a table of `markdown_table` to HTML.

    Args:
        markdown: the table.
        mark: prefix of the row ids, mark and number, which points of a chart refer to; empty if no point does.
    """
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.strip().splitlines()]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in lines[0])
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines[2:]]
    marks = [f' data-row="{mark}{number}"' if mark else "" for number in range(len(cells))]
    body = [f"<tr{of_row}>{row}</tr>" for of_row, row in zip(marks, cells, strict=True)]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _section(report: Report, prefix: str, chosen: Mapping[float, Setting]) -> str:
    """Return the section of a first stage: two charts and the tables.

    Args:
        report: the report.
        prefix: prefix of the row ids.
        chosen: setting that the model's own plan chooses for each budget.
    """
    widths = list(dict.fromkeys(_width(item.result.setting) for item in report.settings))
    levels = [
        (item.baseline.name, mean(item.baseline.per_query[QUALITY]))
        for item in report.baselines
        if item.baseline.flops_per_pair is None
    ]
    by_operations = _points(report, prefix, widths, _gigaflops, lambda item: item.on_front)
    by_time = _points(
        report, prefix, widths, lambda item: milliseconds(item.pairs_per_second), lambda item: item.on_time_front
    )
    charts = [
        chart(by_operations, levels, "GFLOP per pair", QUALITY),
        chart(by_time, levels, "milliseconds per pair, as measured", QUALITY),
    ]
    legend = "".join(
        f'<span class="group{number % 6}">{escape(describe_width(*width))}</span>'
        for number, width in enumerate(widths)
    )
    tables = [
        f"<h3>{escape(table.heading)}</h3>{html_table(table.markdown, table.mark and f'{prefix}{table.mark}')}"
        for table in report.tables(chosen)
    ]
    about_fused = ""
    if report.fusion is not None:
        about_fused = (
            f" Hollow points are fused with the first stage at weight {report.fusion.weight:g}, chosen by "
            f"{report.fusion.queries} of these queries."
        )
    return "\n".join(
        [
            f"<section><h2>{escape(report.title)}</h2>",
            '<p class="details" aria-live="polite">Hover over a point, or use Tab and the arrow keys. The broad line '
            f"is the Pareto front; diamonds are cascades, squares baselines.{about_fused}</p>",
            f'<div class="charts">{"".join(charts)}</div><p class="legend">{legend}</p>',
            *tables,
            "</section>",
        ]
    )


def _points(
    report: Report,
    prefix: str,
    widths: Sequence[Width],
    cost: Callable[[Result | Baseline], float | None],
    on_front: Callable[[SettingComparison], bool],
) -> list[Point]:
    """Return the points of a chart: baselines with a cost, settings, and fused settings and orders.

    Args:
        report: the report.
        prefix: prefix of the row ids.
        widths: widths in the order of their colours.
        cost: returns the cost of a result or a baseline, None if it has none.
        on_front: returns True for a setting on the chart's Pareto front.
    """
    found = []
    for number, comparison in enumerate(report.baselines):
        if (value := cost(comparison.baseline)) is not None:
            quality = mean(comparison.baseline.per_query[QUALITY])
            text = _describe(comparison.baseline.name, quality, comparison)
            found.append(Point(f"{prefix}{SETTINGS}{number}", value, quality, text, None))
    for number, item in enumerate(report.settings, len(report.baselines)):
        setting, quality = item.result.setting, item.result.mean(QUALITY)
        value = cost(item.result)
        assert value is not None
        text = _describe(str(setting), quality, item)
        group, row = widths.index(_width(setting)), f"{prefix}{SETTINGS}{number}"
        found.append(Point(row, value, quality, text, group, bool(setting.cascade), on_front(item)))
    return found + ([] if report.fusion is None else _fused_points(report.fusion, prefix, widths, cost))


def _fused_points(
    fusion: FusionResult,
    prefix: str,
    widths: Sequence[Width],
    cost: Callable[[Result | Baseline], float | None],
) -> list[Point]:
    found = []
    for number, item in enumerate(fusion.settings, 1):  # row 0 is the first stage
        setting, quality = item.result.setting, item.result.mean(QUALITY)
        value = cost(item.result)
        assert value is not None
        change, interval, p_value = difference(item.against_plain)
        held_out = f"held out {item.plain.mean:.4f} plain and {item.fused.mean:.4f} fused"
        against = f"{change} ({f'95 %: {interval}, ' if interval else ''}p = {p_value})"
        text = f"{setting}, fused: {QUALITY} {quality:.4f}; {held_out}, {against}; {_cost(item.result)}"
        group, row = widths.index(_width(setting)), f"{prefix}{FUSED}{number}"
        found.append(Point(row, value, quality, text, group, bool(setting.cascade), is_fused=True))
    for number, comparison in enumerate(fusion.orders):
        baseline = comparison.order.baseline
        value = cost(baseline)
        if value is None or not comparison.order.weights or comparison.order.is_reference:
            continue
        quality = mean(baseline.per_query[QUALITY])
        text = f"{baseline.name}: {QUALITY} {quality:.4f}; held out {comparison.held_out.mean:.4f}; {_cost(baseline)}"
        found.append(Point(f"{prefix}{ORDERS}{number}", value, quality, text, None, is_fused=True))
    return found


def _describe(name: str, quality: float, item: SettingComparison | BaselineComparison) -> str:
    """Describe a point: the text that is shown when it is hovered over or focused."""
    measured = item.result if isinstance(item, SettingComparison) else item.baseline
    change, interval, p_value = difference(item)
    against = ""
    if change:
        against = f"; {change} against the full network ({f'95 %: {interval}, ' if interval else ''}p = {p_value})"
    return f"{name}: {QUALITY} {quality:.4f}{against}; {_cost(measured)}, {item.flops_share:.0%} of its operations"


def _cost(item: Result | Baseline) -> str:
    time = milliseconds(item.pairs_per_second)
    return f"{_gigaflops(item) or 0:.4g} GFLOP and {time:.4g} ms per pair"


def _gigaflops(item: Result | Baseline) -> float | None:
    return None if item.flops_per_pair is None else item.flops_per_pair / 1e9


def _width(setting: Setting) -> Width:
    return setting.compress_layers, setting.compress_ratio


@dataclass(frozen=True)
class Point:
    """A point of a chart: a setting, or a baseline with a cost.

    Attributes:
        row: id of its row in a table, which is highlighted together with the point.
        cost, quality: its coordinates.
        text: its description.
        group: number of its width, for the colour; None for a baseline.
        is_cascade: draw a diamond.
        on_front: the Pareto front passes through it.
        is_fused: draw it hollow.
    """

    row: str
    cost: float
    quality: float
    text: str
    group: int | None
    is_cascade: bool = False
    on_front: bool = False
    is_fused: bool = False


def chart(points: Sequence[Point], levels: Sequence[tuple[str, float]], x_label: str, y_label: str) -> str:
    """Draw an `<svg>` with the points in the order of their costs.

    Args:
        points: the points.
        levels: name and quality of orders without a cost, drawn as horizontal lines.
        x_label, y_label: labels of the axes.
    """
    points = sorted(points, key=lambda point: (point.cost, point.quality))
    right = max(point.cost for point in points) * 1.05
    qualities = [*(point.quality for point in points), *(quality for _, quality in levels)]
    margin = 0.08 * (max(qualities) - min(qualities)) or 0.05
    low, high = min(qualities) - margin, max(qualities) + margin

    def x(cost: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * cost / right

    def y(quality: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (quality - low) / (high - low)

    bottom, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{escape(y_label)} by {escape(x_label)}">']
    for value in ticks(0.0, right):
        parts.append(f'<path class="grid" d="M{x(value):.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>')
    for value in ticks(low, high):
        parts.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{end}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<text x="{(LEFT + end) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">')
    parts.append(f"{escape(y_label)}</text>")
    for name, quality in levels:
        parts.append(f'<path class="level" d="M{LEFT} {y(quality):.1f}H{end}"/>')
        parts.append(f'<text x="{end}" y="{y(quality) - 4:.1f}" text-anchor="end">{escape(name)}</text>')
    front = [point for point in points if point.on_front]
    if front:
        steps = "".join(f"H{x(point.cost):.1f}V{y(point.quality):.1f}" for point in front[1:])
        parts.append(f'<path class="front" d="M{x(front[0].cost):.1f} {y(front[0].quality):.1f}{steps}H{end}"/>')
    parts += [_mark(point, x(point.cost), y(point.quality)) for point in points]
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float) -> list[float]:
    """Return about `TICKS` round numbers between two values.

    >>> ticks(0.0, 13.5)
    [0.0, 5.0, 10.0]
    """
    raw = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _mark(point: Point, x: float, y: float) -> str:
    """Draw a circle, for a cascade a diamond, for a baseline a square; hollow if scores are fused."""
    kind = ("baseline" if point.group is None else f"group{point.group % 6}") + (" fused" if point.is_fused else "")
    shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
    if point.is_cascade:
        shape = f'<path d="M{x:.1f} {y - 8:.1f}l8 8-8 8-8-8z"/>'
    elif point.group is None:
        shape = f'<path d="M{x - 6:.1f} {y - 6:.1f}h12v12h-12z"/>'
    return (
        f'<g class="point {kind}" tabindex="0" role="img" aria-label="{escape(point.text)}" data-row="{point.row}">'
        f"<title>{escape(point.text)}</title>{shape}</g>"
    )
