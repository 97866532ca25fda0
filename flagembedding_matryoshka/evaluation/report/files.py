"""Files of a report: table.md, results.json, report.html and a plot of each first stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.evaluation.report.html import page
from flagembedding_matryoshka.evaluation.report.plot import plot
from flagembedding_matryoshka.evaluation.report.report import Report, first_stages_table
from flagembedding_matryoshka.files import write_text
from flagembedding_matryoshka.setting import Setting


def write_report(
    output: Path, name: str, reports: Mapping[str, Report], chosen: Mapping[float, Setting], machine: Mapping[str, Any]
) -> None:
    """Write and print a report.

    Args:
        output: directory of the files.
        name: name of the collection.
        reports: name of each first stage to its report.
        chosen: setting that the model's own plan chooses for each budget.
        machine: the machine, as JSON values.
    """
    first, *others = reports.values()
    first_stages = first_stages_table(reports) if others else None
    sections = [] if first_stages is None else [first_stages]
    for report in reports.values():
        sections.append(f"{name}: {report.title}\n")
        sections += [f"{table.heading}:\n\n{table.markdown}" for table in report.tables(chosen)]
    text = "\n".join(sections)
    print(text)
    values = {
        "data": name,
        "machine": machine,
        **first.as_json(),
        "chosen": [{"budget": budget, **asdict(setting)} for budget, setting in chosen.items()],
        "other_first_stages": [report.as_json() for report in others],
    }
    write_text(output / "table.md", text)
    write_text(output / "results.json", json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    write_text(output / "report.html", page(name, list(reports.values()), first_stages, chosen))
    plots = ["quality_cost.png", *(f"quality_cost_{other}.png" for other in list(reports)[1:])]
    for report, file in zip(reports.values(), plots, strict=True):
        plot(report, f"{name}: {report.title}", output / file)
    print(f"Wrote report.html, table.md, results.json, {', '.join(plots)} and a TREC run per setting to {output}.")
