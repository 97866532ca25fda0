"""Score pairs of query and passage.

flagembedding-matryoshka score --model smollm2 --input pairs.jsonl --output scored.jsonl

A line is {"query": …, "passage": …}, where "document" is another name of the passage, ["query", "passage"], or the two
with a tab between them. It is written back with "score" and all else that it has; with several --cutoff_layers
"score" is a list, in their order. An output that is there is continued behind its last whole line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from flagembedding_matryoshka.cli.job import Job, add_files, run_job
from flagembedding_matryoshka.cli.rows import PASSAGE, Row, as_pair, name_of
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker


class Score(Job):
    """A score for each pair, or a list of one for each cutoff layer."""

    result = "score"
    as_row = staticmethod(as_pair)

    @staticmethod
    def pairs(row: Row) -> int:
        return 1

    @staticmethod
    def kept(row: Row) -> Row:
        return row

    def results(self, reranker: MatryoshkaReranker, rows: list[Row]) -> list[Any]:
        pairs = [(row["query"], row[name_of(row, PASSAGE)]) for row in rows]
        scores: list[Any] = reranker.compute_score(pairs, show_progress_bar=False, **self.call)
        return [list(of_pair) for of_pair in zip(*scores, strict=True)] if isinstance(scores[0], list) else scores


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_files(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    run_job(parser, Score, parser.parse_args(arguments), {})
