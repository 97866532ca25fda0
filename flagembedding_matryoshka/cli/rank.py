"""Order the documents of each query by relevance.

flagembedding-matryoshka rank --model smollm2 --input lists.jsonl --output ranked.jsonl --top_k 10

A line is {"query": …, "documents": […]}, ["query", "document", …], or the query and its documents separated by tabs.
"passages" is another name of "documents". A document is a string, or an object with "text". A line that is an object
may have an "instruction" of its own, which overrides --instruction. Files may be compressed by gzip (.gz). The output
has "ranking" in place of the documents, best first: "corpus_id", the document's index in the line, "score", and the
other fields of the document. If the output file exists, the run resumes after its last complete line.

--first_stage_field bm25 --fusion 0.35 fuses scores with the first stage's scores. These are the "bm25" of documents
that are objects, or a list "bm25" of the line with a score for each document. Null means that the first stage did not
find the document. Documents of the ranking then also have "first_stage_score" and "fused_score", and rank by
"fused_score".

--store DIR ranks passages that `store` has computed, by the "id" of documents that are objects. Such documents need no
"text". The states of other documents are computed from their texts.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from flagembedding_matryoshka.cli.commands import add_files, run
from flagembedding_matryoshka.cli.rows import (
    DOCUMENTS,
    Row,
    as_list,
    first_stage_scores,
    id_of,
    name_of,
    text_of,
)
from flagembedding_matryoshka.cli.work import Work
from flagembedding_matryoshka.inference.arguments import add_ranking, given_ranking
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.inference.scoring import Hit
from flagembedding_matryoshka.inference.store import PassageStore
from flagembedding_matryoshka.parser import Parser

FIRST_STAGE_FIELD = "first_stage_field"
STORE = "store"
OF_STORE = ("store_layer", "compress_ratio")
"""Options of the re-ranker that a store has."""
WEIGHTS = ("fusion", "budget", "quality")
"""Options of the re-ranker that can give the weight of the first stage's scores."""


class Rank(Work):
    """Rankings by `MatryoshkaReranker.rank`, with the other fields of documents that are objects.

    `call` may have "first_stage_field", the name of the field with the first stage's scores, and "store", the directory
    of stored passages.
    """

    result = "ranking"

    @staticmethod
    def as_row(value: Any, call: Mapping[str, Any]) -> Row:
        row = as_list(value, STORE in call)
        if FIRST_STAGE_FIELD in call:
            first_stage_scores(row, call[FIRST_STAGE_FIELD])
        return row

    @staticmethod
    def pairs(row: Row) -> int:
        return len(row[name_of(row, DOCUMENTS)])

    @staticmethod
    def kept(row: Row) -> Row:
        return {name: value for name, value in row.items() if name not in DOCUMENTS}

    @cached_property
    def store(self) -> PassageStore:
        """The store of `call`."""
        return self.reranker.open_store(self.call[STORE])

    def results(self, reranker: MatryoshkaReranker, rows: list[Row]) -> list[Any]:
        lists = [row[name_of(row, DOCUMENTS)] for row in rows]
        texts = [[text_of(document) for document in documents] for documents in lists]
        queries = [row["query"] for row in rows]
        own = [row.get("instruction") for row in rows]
        of_rows: dict[str, Any] = {} if own == [None] * len(own) else {"instruction": own}
        if STORE in self.call:
            of_rows["ids"] = [[id_of(document) for document in documents] for documents in lists]
            of_rows[STORE] = self.store
        call = {name: value for name, value in self.call.items() if name not in (FIRST_STAGE_FIELD, STORE)}
        if (field := self.call.get(FIRST_STAGE_FIELD)) is not None:
            of_rows["first_stage_scores"] = [first_stage_scores(row, field) for row in rows]
        rankings = reranker.rank_batch(queries, texts, show_progress_bar=False, **call, **of_rows)
        return [
            [hit | _other_fields(documents[hit["corpus_id"]], hit) for hit in ranking]
            for documents, ranking in zip(lists, rankings, strict=True)
        ]


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    add_files(parser)
    add_ranking(parser)
    parser.add_argument(
        f"--{FIRST_STAGE_FIELD}",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="field with the first stage's scores, to fuse with the re-ranker's: a number or null in documents that "
        "are objects, or a list in the line with a number or null for each document. Needs a weight: --fusion, or the "
        "plan's weight with --budget or --quality",
    )
    parser.add_argument(
        f"--{STORE}",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="directory that `store` wrote, with the passages of documents that are objects with an id",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    given = vars(options)
    if FIRST_STAGE_FIELD in given and "first_stage" in given:
        parser.error(f"--first_stage_field {options.first_stage_field} and --first_stage order: give one of them")
    has_first_stage = FIRST_STAGE_FIELD in given or "first_stage" in given
    if "fusion" in given and not has_first_stage:
        parser.error(
            f"--fusion {options.fusion} needs the first stage's scores: give --first_stage_field, or --first_stage "
            "order for documents in its order"
        )
    if has_first_stage and not any(name in given for name in WEIGHTS):
        parser.error(
            "the first stage's scores need a weight: give --fusion, a number of at least 0, or auto for the weight in "
            "the model's plan"
        )
    if STORE in given and (own := [name for name in OF_STORE if name in given]):
        parser.error(f"--{own[0]} {given[own[0]]} and --{STORE}: the store has been written with a {own[0]}")
    of_rows = {name: given[name] for name in (FIRST_STAGE_FIELD, STORE) if name in given}
    run(parser, Rank, options, given_ranking(options) | of_rows)


def _other_fields(document: Any, hit: Hit) -> dict[str, Any]:
    """Return the fields of a document that is an object, without its text and without the fields of its hit."""
    if isinstance(document, str):
        return {}
    return {name: value for name, value in document.items() if name not in ("text", *hit)}
