"""The report as one HTML file with interactive charts. It loads no other file, so it works offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

from flagembedding_matryoshka.evaluation.baselines import Baseline
from flagembedding_matryoshka.evaluation.comparison import BaselineComparison, SettingComparison, milliseconds
from flagembedding_matryoshka.evaluation.fusion import FusionResult
from flagembedding_matryoshka.evaluation.report.plot import svg_charts
from flagembedding_matryoshka.evaluation.report.report import FUSED, ORDERS, SETTINGS, Report
from flagembedding_matryoshka.evaluation.report.tables import difference
from flagembedding_matryoshka.evaluation.results import Result
from flagembedding_matryoshka.evaluation.runs import QUALITY, mean
from flagembedding_matryoshka.setting import Setting

TEMPLATE = "page.html"


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
    charts = svg_charts(report, _labels(report), prefix)
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
            f"is the Pareto front; stars are cascades, crosses other orders.{about_fused}</p>",
            f'<div class="charts">{"".join(charts)}</div>',
            *tables,
            "</section>",
        ]
    )


def _labels(report: Report) -> dict[str, str]:
    """Return the text of each point, by the id of its row: settings, baselines, and fused settings and orders."""
    items: list[SettingComparison | BaselineComparison] = [*report.baselines, *report.settings]
    found = {}
    for number, item in enumerate(items):
        name, result = _named_result(item)
        change, interval, p_value = difference(item)
        against = ""
        if change:
            against = f"; {change} against the full network ({f'95 %: {interval}, ' if interval else ''}p = {p_value})"
        if result.flops_per_pair is not None:
            costs = f"{_cost(result)}, {item.flops_share:.0%} of its operations"
            found[f"{SETTINGS}{number}"] = f"{name}: {_quality(result)}{against}; {costs}"
    return found if report.fusion is None else found | _fused_labels(report.fusion)


def _fused_labels(fusion: FusionResult) -> dict[str, str]:
    found = {}
    for number, item in enumerate(fusion.settings, 1):  # row 0 is the first stage
        change, interval, p_value = difference(item.against_plain)
        held_out = f"held out {item.plain.mean:.4f} plain and {item.fused.mean:.4f} fused"
        against = f"{change} ({f'95 %: {interval}, ' if interval else ''}p = {p_value})"
        name = f"{item.result.setting}, fused"
        found[f"{FUSED}{number}"] = f"{name}: {_quality(item.result)}; {held_out}, {against}; {_cost(item.result)}"
    for number, comparison in enumerate(fusion.orders):
        baseline = comparison.order.baseline
        held_out = f"held out {comparison.held_out.mean:.4f}"
        found[f"{ORDERS}{number}"] = f"{baseline.name}: {_quality(baseline)}; {held_out}; {_cost(baseline)}"
    return found


def _named_result(item: SettingComparison | BaselineComparison) -> tuple[str, Result | Baseline]:
    """Return the name and the result of a setting or a baseline."""
    if isinstance(item, SettingComparison):
        return str(item.result.setting), item.result
    return item.baseline.name, item.baseline


def _quality(item: Result | Baseline) -> str:
    return f"{QUALITY} {mean(item.per_query[QUALITY]):.4f}"


def _cost(item: Result | Baseline) -> str:
    """Return operations and time; empty without a cost."""
    if item.flops_per_pair is None:
        return ""
    return f"{item.flops_per_pair / 1e9:.4g} GFLOP and {milliseconds(item.pairs_per_second):.4g} ms per pair"
