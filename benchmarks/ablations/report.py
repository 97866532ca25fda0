"""Reports of comparisons: tables in Markdown and in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.ablations.ranking import Collections, given_quality
from benchmarks.ablations.statistics import Arm, Comparison, compare
from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.evaluation.report.tables import markdown_table
from flagembedding_matryoshka.evaluation.results import machine_of
from flagembedding_matryoshka.evaluation.runs import QUALITY
from flagembedding_matryoshka.files import write_text

DEVIATION = "± seeds"
READING = {
    QUALITY: "mean over queries and seeds; higher is better.",
    DEVIATION: "standard deviation of the seeds' means. p is about other queries, ± about other seeds.",
    "change": "difference to the reference row, which has none.",
    "p": (
        "p-value of the change: two-sided paired randomisation test over queries, on each query's mean over seeds, "
        "with Holm's correction over all rows of the table. Below 0.05 a difference is commonly taken to hold for "
        "other queries of the kind."
    ),
}
"""Explanations of the columns that all tables share."""


@dataclass(frozen=True)
class Report:
    """The text around the tables of a comparison.

    Attributes:
        name: name of the files.
        title: the question that the comparison answers.
        compared: description of the sides.
        reading: explanations of further columns, by name.
        about: the conditions of the measurement, by name.
    """

    name: str
    title: str
    compared: str
    reading: dict[str, str]
    about: dict[str, Any]

    def write(self, output: Path, collections: Collections, arms: Callable[[Sequence[str]], list[Arm]]) -> None:
        """Write NAME.md and NAME.json.

        Args:
            output: directory of the files.
            collections: the candidates that were ranked, by collection.
            arms: returns the rows over all queries of some collections.
        """
        names = list(collections)
        scopes = [names, *([name] for name in names)] if len(names) > 1 else [names]
        tables = [(scope, compare(arms(scope))) for scope in scopes]
        lines = [f"# {self.title}", "", self.compared, ""]
        stored = []
        for scope, rows in tables:
            given, source = fmean(given_quality(collections, scope)), collections[scope[0]].source
            queries = sum(len(collections[name].passages) for name in scope)
            pairs = sum(len(collections[name]) for name in scope)
            title = scope[0] if len(scope) == 1 else f"All {len(scope)} collections together"
            lines += [f"## {title}", "", f"{queries} queries, {pairs} pairs: {source}. {QUALITY} of their own order: "]
            lines[-1] += f"{given:.4f}."
            lines += ["", markdown_table(cells(rows))]
            about = {"collections": scope, "queries": queries, "pairs": pairs, "candidates": source}
            stored.append(about | {f"{QUALITY} of the candidates' order": given, "rows": list(map(as_json, rows))})
        columns = cells(tables[0][1])[0]
        reading = {name: text for name, text in (READING | self.reading).items() if name in columns}
        lines += ["## How to read it", "", *(f"- **{name}**: {text}" for name, text in reading.items()), ""]
        lines += ["## How it was measured", "", *(f"- {name}: {in_words(value)}" for name, value in self.about.items())]
        write_text(output / f"{self.name}.md", "\n".join(lines) + "\n")
        report = {"claim": self.title, "compared": self.compared, "about": self.about, "tables": stored}
        write_text(output / f"{self.name}.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print("\n".join(lines))
        print(f"\nWrote {self.name}.md and {self.name}.json to {output}.")


def about_machine(reranker: MatryoshkaReranker) -> dict[str, Any]:
    """Return the machine of a re-ranker, and the lengths that texts are truncated to."""
    found = machine_of(reranker)
    if reranker.query_max_length is not None:
        found["queries are truncated to"] = f"{reranker.query_max_length} tokens"
    found["pairs are truncated to"] = f"{reranker.max_length} tokens"
    return found


def cells(rows: Sequence[Comparison]) -> list[list[str]]:
    """Return header and rows of a table. It has a column of seeds if a row has several seeds."""
    with_seeds = any(row.deviation is not None for row in rows)
    seeds = [DEVIATION] if with_seeds else []
    header = [*rows[0].arm.names, QUALITY, *seeds, "change", "p", *rows[0].arm.further]
    return [
        header,
        *(
            [
                *row.arm.names.values(),
                f"{row.arm.mean:.4f}",
                *(["" if row.deviation is None else f"{row.deviation:.4f}"] if with_seeds else []),
                "" if row.change is None else f"{row.change:+.4f}",
                "" if row.p_value is None else "< 0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}",
                *(f"{value:#.4g}" for value in row.arm.further.values()),
            ]
            for row in rows
        ),
    ]


def as_json(row: Comparison) -> dict[str, Any]:
    """Return a row with all digits, and each seed's mean."""
    return {
        **row.arm.names,
        QUALITY: row.arm.mean,
        "of seeds": row.arm.of_seeds,
        "deviation": row.deviation,
        "change": row.change,
        "p_value": row.p_value,
        **row.arm.further,
    }


def in_words(value: Any) -> str:
    """Return a value as text: a list as its items."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
