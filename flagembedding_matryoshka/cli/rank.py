"""Order the documents of each query by relevance.

flagembedding-matryoshka rank --model smollm2 --input lists.jsonl --output ranked.jsonl --top_k 10

A line is {"query": …, "documents": […]}, where "passages" is another name of the documents, ["query", "document", …],
or the query and its documents with tabs between them. A document is a string, or an object with "text". A line that is
an object may have an "instruction" of its own, which goes before --instruction. The line is written back with "ranking"
in place of the documents, the best first: "corpus_id", which is the document's place in the line from 0, "score", and
what else the document has. An output that is there is continued behind its last whole line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from flagembedding_matryoshka.cli.job import Job, add_files, run_job
from flagembedding_matryoshka.cli.rows import DOCUMENTS, Row, as_list, name_of, text_of
from flagembedding_matryoshka.inference.arguments import add_ranking, given_ranking
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker


class Rank(Job):
    """What `MatryoshkaReranker.rank` returns for each query, with the other fields of documents that are objects."""

    result = "ranking"
    as_row = staticmethod(as_list)

    @staticmethod
    def pairs(row: Row) -> int:
        return len(row[name_of(row, DOCUMENTS)])

    @staticmethod
    def kept(row: Row) -> Row:
        return {name: value for name, value in row.items() if name not in DOCUMENTS}

    def results(self, reranker: MatryoshkaReranker, rows: list[Row]) -> list[Any]:
        lists = [row[name_of(row, DOCUMENTS)] for row in rows]
        texts = [[text_of(document) for document in documents] for documents in lists]
        queries = [row["query"] for row in rows]
        own = [row.get("instruction") for row in rows]
        instructed: dict[str, Any] = {} if own == [None] * len(own) else {"instruction": own}
        rankings = reranker.rank_batch(queries, texts, show_progress_bar=False, **self.call, **instructed)
        return [
            [hit | _beside(documents[hit["corpus_id"]], hit) for hit in ranking]
            for documents, ranking in zip(lists, rankings, strict=True)
        ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_files(parser)
    add_ranking(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    run_job(parser, Rank, options, given_ranking(options))


def _beside(document: Any, hit: dict[str, Any]) -> dict[str, Any]:
    """What a document that is an object has beside its text, and its hit has not."""
    if isinstance(document, str):
        return {}
    return {name: value for name, value in document.items() if name not in ("text", *hit)}
