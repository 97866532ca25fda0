"""A report as one file of HTML: no script or style of elsewhere, for a browser that is offline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

from flagembedding_matryoshka.evaluation.baselines import Baseline
from flagembedding_matryoshka.evaluation.chart import Point, chart
from flagembedding_matryoshka.evaluation.fusion import FusionReport
from flagembedding_matryoshka.evaluation.metrics import QUALITY, mean
from flagembedding_matryoshka.evaluation.report import Compared, ComparedBaseline, milliseconds
from flagembedding_matryoshka.evaluation.stage import FUSED, ORDERS, SETTINGS, Stage
from flagembedding_matryoshka.evaluation.store import Result
from flagembedding_matryoshka.evaluation.table import difference
from flagembedding_matryoshka.setting import Setting

TEMPLATE = "page.html"


def page(name: str, stages: Sequence[Stage], beside: str | None, chosen: Mapping[float, Setting]) -> str:
    """The whole file.

    Args:
        name: of the collection.
        beside: a Markdown table of all first stages, where there are several.
        chosen: what the model's own plan chooses, by budget.
    """
    body = [] if beside is None else [html_table(beside)]
    body += [_section(stage, f"s{number}", chosen) for number, stage in enumerate(stages)]
    template = files("flagembedding_matryoshka.evaluation").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(f"Quality and cost: {name}"), body="\n".join(body))


def html_table(markdown: str, mark: str = "") -> str:
    """A table of `markdown_table`.

    Args:
        mark: prefix of the row ids, mark and number, which points of a chart refer to; empty if no point does.
    """
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.strip().splitlines()]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in lines[0])
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines[2:]]
    marks = [f' data-row="{mark}{number}"' if mark else "" for number in range(len(cells))]
    body = [f"<tr{of_row}>{row}</tr>" for of_row, row in zip(marks, cells, strict=True)]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _section(stage: Stage, prefix: str, chosen: Mapping[float, Setting]) -> str:
    widths = list(dict.fromkeys(_width(item.result.setting) for item in stage.compared))
    levels = [
        (item.baseline.name, mean(item.baseline.per_query[QUALITY]))
        for item in stage.baselines
        if item.baseline.flops_per_pair is None
    ]

    def points(cost: Callable[..., float | None], on_front: Callable[[Compared], bool]) -> list[Point]:
        found = []
        for number, beside in enumerate(stage.baselines):
            if (value := cost(beside.baseline)) is not None:
                quality = mean(beside.baseline.per_query[QUALITY])
                text = _said(beside.baseline.name, quality, beside)
                found.append(Point(f"{prefix}{SETTINGS}{number}", value, quality, text, None))
        for number, item in enumerate(stage.compared, len(stage.baselines)):
            setting, quality = item.result.setting, item.result.mean(QUALITY)
            value = cost(item.result)
            assert value is not None
            text = _said(str(setting), quality, item)
            group = widths.index(_width(setting))
            row = f"{prefix}{SETTINGS}{number}"
            found.append(Point(row, value, quality, text, group, bool(setting.cascade), on_front(item)))
        return found + ([] if stage.fusion is None else fused_points(stage.fusion, cost))

    def fused_points(fusion: FusionReport, cost: Callable[..., float | None]) -> list[Point]:
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
        for number, beside in enumerate(fusion.orders):
            baseline = beside.order.baseline
            value = cost(baseline)
            if value is None or not beside.order.weights or beside.order.is_reference:
                continue
            quality = mean(baseline.per_query[QUALITY])
            held_out = f"held out {beside.held_out.mean:.4f}"
            text = f"{baseline.name}: {QUALITY} {quality:.4f}; {held_out}; {_cost(baseline)}"
            found.append(Point(f"{prefix}{ORDERS}{number}", value, quality, text, None, is_fused=True))
        return found

    by_operations = points(
        lambda item: None if item.flops_per_pair is None else item.flops_per_pair / 1e9, lambda item: item.on_front
    )
    by_time = points(lambda item: milliseconds(item.pairs_per_second), lambda item: item.on_time_front)
    legend = "".join(
        f'<span class="group{number % 6}">{escape(_width_in_words(*width))}</span>'
        for number, width in enumerate(widths)
    )
    tables = [
        f"<h3>{escape(part.said)}</h3>{html_table(part.table, part.mark and f'{prefix}{part.mark}')}"
        for part in stage.parts(chosen)
    ]
    about_fused = ""
    if stage.fusion is not None:
        about_fused = (
            f" Hollow points are fused with the first stage at weight {stage.fusion.weight:g}, chosen by "
            f"{stage.fusion.queries} of these queries."
        )
    charts = [
        chart(by_operations, levels, "GFLOP per pair", QUALITY),
        chart(by_time, levels, "milliseconds per pair, as measured", QUALITY),
    ]
    return "\n".join(
        [
            f"<section><h2>{escape(stage.about)}</h2>",
            '<p class="details" aria-live="polite">Hover over a point, or go from one to the next with Tab and the '
            "arrow keys. The broad line is the Pareto front; diamonds are cascades, squares baselines."
            f"{about_fused}</p>",
            f'<div class="charts">{"".join(charts)}</div><p class="legend">{legend}</p>',
            *tables,
            "</section>",
        ]
    )


def _said(name: str, quality: float, item: Compared | ComparedBaseline) -> str:
    """Return the text beside the charts for the point under the pointer."""
    of = item.result if isinstance(item, Compared) else item.baseline
    change, interval, p_value = difference(item)
    against = ""
    if change:
        against = f"; {change} against the full network ({f'95 %: {interval}, ' if interval else ''}p = {p_value})"
    return f"{name}: {QUALITY} {quality:.4f}{against}; {_cost(of)}, {item.flops_share:.0%} of its operations"


def _cost(item: Result | Baseline) -> str:
    time = milliseconds(item.pairs_per_second)
    return f"{(item.flops_per_pair or 0) / 1e9:.4g} GFLOP and {time:.4g} ms per pair"


def _width(setting: Setting) -> tuple[tuple[int, ...], int]:
    return setting.compress_layers, setting.compress_ratio


def _width_in_words(after: tuple[int, ...], ratio: int) -> str:
    return "full width" if ratio == 1 else f"ratio {ratio} after {', '.join(map(str, after))}"
