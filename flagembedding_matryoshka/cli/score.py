"""Score pairs of query and passage.

flagembedding-matryoshka score --model smollm2 --input pairs.jsonl --output scored.jsonl

A line is {"query": …, "passage": …}, ["query", "passage"], or both separated by a tab. "document" is another name of
"passage". A line that is an object may have an "instruction" of its own, which overrides --instruction. A file .csv has
a header that names the columns. Files may be compressed by gzip (.gz). The output has all fields of the line and
"score"; with several --cutoff_layers "score" is a list, in their order. If the output file exists, the run resumes
after its last complete line.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from flagembedding_matryoshka.cli.commands import add_files, run
from flagembedding_matryoshka.cli.rows import PASSAGE, Row, as_pair, name_of
from flagembedding_matryoshka.cli.work import Work
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.parser import Parser
from flagembedding_matryoshka.text.pairs import TokenizedPair

RANKING_OPTIONS = ("fusion", "first_stage", "first_stage_field")
"""Options of `rank` that `score` refuses with a message of its own."""


class Score(Work):
    """A score for each pair, or with several cutoff layers a list of scores."""

    result = "score"

    @staticmethod
    def as_row(value: Any, call: Mapping[str, Any]) -> Row:
        return as_pair(value)

    @staticmethod
    def pairs(row: Row) -> int:
        return 1

    @staticmethod
    def kept(row: Row) -> Row:
        return row

    def results(self, reranker: MatryoshkaReranker, rows: list[Row]) -> list[Any]:
        pairs = [(row["query"], row[name_of(row, PASSAGE)]) for row in rows]
        own = [row.get("instruction") for row in rows]
        inputs = pairs if own == [None] * len(own) else _tokenized(reranker, pairs, own)
        scores: list[Any] = reranker.compute_score(inputs, show_progress_bar=False, **self.call)
        return [list(of_pair) for of_pair in zip(*scores, strict=True)] if isinstance(scores[0], list) else scores


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_files(parser, without=RANKING_OPTIONS)
    for name in RANKING_OPTIONS:
        parser.add_argument(
            f"--{name}", action=_RefuseRankingOption, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


class _RefuseRankingOption(argparse.Action):
    """Refuse an option that changes the order of a ranking."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        parser.error(f"{option} changes the order of a query's documents, and score does not rank: use rank")


def _tokenized(
    reranker: MatryoshkaReranker, pairs: Sequence[tuple[str, str]], instructions: Sequence[str | None]
) -> list[TokenizedPair]:
    """Tokenise pairs, all pairs of one instruction in one call.

    Args:
        instructions: instruction of each pair; None is the re-ranker's own.
    """
    places: dict[str | None, list[int]] = {}
    for place, instruction in enumerate(instructions):
        places.setdefault(instruction, []).append(place)
    found: dict[int, TokenizedPair] = {}
    for instruction, own in places.items():
        found |= zip(own, reranker.tokenize([pairs[place] for place in own], instruction=instruction), strict=True)
    return [found[place] for place in range(len(pairs))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    run(parser, Score, parser.parse_args(arguments), {})
