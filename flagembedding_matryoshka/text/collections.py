"""Collections in BEIR layout (arXiv 2104.08663)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.text.lines import good_lines, good_rows

logger = logging.getLogger(__name__)

QRELS_HEADER = ["query-id", "corpus-id", "score"]


@dataclass(frozen=True)
class Collection:
    """A BEIR collection.

    Attributes:
        passages: id to "title text".
        queries: id to text.
        relevant: query id to {passage id: grade above 0}, in the order of the qrels, without queries that have no
            relevant passage. May name passages that are not in the corpus. They lower recall and nDCG, because no run
            can contain them.
        irrelevant: query id to {passage id: grade of 0 or less}, in the order of the qrels.
        instructions: query id to its instruction, of the queries that have one.
    """

    passages: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, dict[str, int]]
    irrelevant: dict[str, dict[str, int]] = field(default_factory=dict)
    instructions: dict[str, str] = field(default_factory=dict)

    def is_itself(self, query: str, passage: str) -> bool:
        """Return whether a passage is the query itself, as in ArguAna: same id and text, and not judged relevant.

        An equal id may be chance.
        """
        is_relevant = passage in self.relevant.get(query, ())
        return passage == query and not is_relevant and self.queries[query] in self.passages.get(passage, "")


def read_collection(directory: Path, split: str) -> Collection:
    """Read `corpus.jsonl`, `queries.jsonl` and `qrels/{split}.tsv`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: naming file and line of a malformed row, an unknown query or a second grade of a passage, or if no
            passage is relevant.
    """
    corpus, topics, qrels = (directory / name for name in ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv"))
    for path in (corpus, topics, qrels):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: BEIR's layout is corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv")
    passages, queries = read_texts(corpus), read_texts(topics)
    relevant: dict[str, dict[str, int]] = {}
    irrelevant: dict[str, dict[str, int]] = {}
    for number, query, passage, score in _read_judgements(qrels):
        if score > 0 and query not in queries:
            raise ValueError(f"{qrels}, line {number}: {topics.name} has no query {query!r}")
        same, other = (relevant, irrelevant) if score > 0 else (irrelevant, relevant)
        grade = other.get(query, {}).get(passage, score)
        if grade == score:
            grade = same.setdefault(query, {}).setdefault(passage, score)
        if grade != score and max(grade, score) > 0:
            raise ValueError(f"{qrels}, line {number}: {passage!r} has grade {score} for {query!r}, and {grade} above")
    judged = {passage: None for grades in relevant.values() for passage in grades}
    if missing := [passage for passage in judged if passage not in passages]:
        logger.warning(
            "%s: %d of %d relevant passages are not in the corpus, such as %r; they count as not found",
            *(qrels, len(missing), len(judged), missing[0]),
        )
    if not relevant:
        raise ValueError(f"{qrels} has no relevant passage: no score is above 0")
    return Collection(passages, queries, relevant, irrelevant, read_instructions(topics))


def read_texts(path: Path) -> dict[str, str]:
    """Read `corpus.jsonl` or `queries.jsonl`, whose rows have no title. Return "title text" by id.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: naming file and line of a malformed row.
    """
    texts: dict[str, str] = {}

    def fault(row: dict[str, Any]) -> str | None:
        if not all(isinstance(row.get(name), str) for name in ("_id", "text")):
            return "a row must have the strings _id and text"
        if not isinstance(row.get("title"), str | None):
            return f"title must be a string, got {row['title']!r:.80}"
        if not isinstance(row.get("instruction"), str | None):
            return f"instruction must be a string, got {row['instruction']!r:.80}"
        if row["_id"] in texts:
            return f"the _id {row['_id']!r} occurs twice"
        return None

    for row in good_rows(path, fault):
        texts[row["_id"]] = f"{row.get('title') or ''} {row['text']}".strip()
    return texts


def read_instructions(path: Path) -> dict[str, str]:
    """Return the `instruction` of each query of `queries.jsonl` that has one, by id. `read_texts` checks the file."""
    return {row["_id"]: row["instruction"] for row in good_rows(path, lambda row: None) if row.get("instruction")}


def judged_queries(directory: Path, split: str) -> set[str]:
    """Return the ids of the queries in `qrels/{split}.tsv`, whatever their grades.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: naming file and line of a malformed row.
    """
    return {query for _, query, _, _ in _read_judgements(directory / "qrels" / f"{split}.tsv")}


def _read_judgements(path: Path) -> Iterator[tuple[int, str, str, int]]:
    """Yield line, query, passage and grade."""
    for number, line in good_lines(path):
        cells = line.rstrip("\r\n").split("\t")
        if number == 1 and cells != QRELS_HEADER:
            raise ValueError(f"{path}, line 1: the header must be {QRELS_HEADER}, separated by tabs, got {cells}")
        if number == 1:
            continue
        if len(cells) != 3 or not cells[2].removeprefix("-").isdecimal():
            raise ValueError(f"{path}, line {number}: a row must be query-id, corpus-id and an int score, got {cells}")
        yield number, cells[0], cells[1], int(cells[2])
