"""The candidates that every setting re-ranks: BM25's, or those of a TREC run."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flagembedding_matryoshka.inference.fusion import as_first_stage
from flagembedding_matryoshka.mining.retrievers import bm25_scored_lists
from flagembedding_matryoshka.text.collections import Collection
from flagembedding_matryoshka.text.lines import good_lines

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidates:
    """What is re-ranked.

    Attributes:
        collection: texts and judgements.
        passages: id of each query that has a relevant passage to its candidates' ids, the best first.
        source: whose lists they are, in words.
        first_stage: id of each query to the first stage's scores of its candidates, in the same order; None if there
            are no such scores.

    Raises:
        TypeError: if a first-stage score is not a number.
        ValueError: if there is no candidate, an id contains white space, which a TREC run does not allow, or a query
            lacks a finite first-stage score for a candidate.
    """

    collection: Collection
    passages: dict[str, list[str]]
    source: str
    first_stage: dict[str, list[float]] | None = None

    def __post_init__(self) -> None:
        if not any(self.passages.values()):
            raise ValueError(f"{self.source}: no query has a candidate")
        if self.first_stage is not None:
            for number, (query, passages) in enumerate(self.passages.items()):
                as_first_stage(number, self.first_stage.get(query, ()), len(passages))
        for name in (*self.passages, *(passage for ids in self.passages.values() for passage in ids)):
            if len(name.split()) != 1:
                raise ValueError(f"the id {name!r} holds white space or nothing: a TREC run cannot name it")

    def __len__(self) -> int:
        """Number of pairs."""
        return sum(map(len, self.passages.values()))

    def texts(self, query: str) -> list[str]:
        """The candidates of a query, in order."""
        return [self.collection.passages[passage] for passage in self.passages[query]]

    def pairs(self, queries: list[str]) -> list[tuple[str, str]]:
        """(query, passage) texts of some queries, list after list."""
        return [(self.collection.queries[query], text) for query in queries for text in self.texts(query)]

    def portions(self, queries: list[str], pairs: int) -> Iterator[list[str]]:
        """Neighbouring queries that have `pairs` candidates together, or few more."""
        portion: list[str] = []
        size = 0
        for query in queries:
            portion.append(query)
            size += len(self.passages[query])
            if size >= pairs:
                yield portion
                portion, size = [], 0
        if size:
            yield portion

    def fingerprint(self) -> str:
        """SHA-256 of all texts, ids and judgements that a result depends on."""
        digest = hashlib.sha256()
        for query, passages in self.passages.items():
            row = [query, self.collection.queries[query], self.collection.relevant[query], passages, self.texts(query)]
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


def sample_queries(collection: Collection, count: int | None, seed: int) -> Collection:
    """The collection with judgements of `count` queries alone, drawn by `seed`, in their order; None is all of them.

    A collection that judges no more than `count` stays as it is.
    """
    if count is None or count >= len(collection.relevant):
        return collection
    drawn = set(random.Random(seed).sample(list(collection.relevant), count))
    relevant = {query: grades for query, grades in collection.relevant.items() if query in drawn}
    return replace(collection, relevant=relevant)


def from_bm25(collection: Collection, top_k: int) -> Candidates:
    """BM25's first `top_k`, where a query shares words with so many, without the query itself.

    A query that shares a word with no passage has no candidates and counts with 0 in every measure.
    """
    ids, queries = list(collection.passages), list(collection.relevant)
    texts = [collection.queries[query] for query in queries]
    found = bm25_scored_lists(list(collection.passages.values()), texts, top_k + 1)
    best = {
        query: {ids[place]: score for place, score in scores.items() if not collection.is_itself(query, ids[place])}
        for query, scores in zip(queries, found, strict=True)
    }
    without = [query for query, scores in best.items() if not scores]
    if without:
        logger.warning("BM25 finds nothing for %d queries, which count with 0, such as %r", len(without), without[0])
    return _first_of(collection, best, top_k, f"BM25's first {top_k}")


def from_run(collection: Collection, path: Path, top_k: int) -> Candidates:
    """The `top_k` of each query that a TREC run (query Q0 passage rank score tag) scores highest; ties as they stand.

    The query itself is no candidate.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line of what is malformed or unknown, or the query that has no line.
    """
    scores: dict[str, dict[str, float]] = {query: {} for query in collection.queries}
    for number, line in good_lines(path):
        cells = line.split()
        if len(cells) != 6 or (score := _number(cells[4])) is None:
            raise ValueError(
                f"{path}, line {number}: query, Q0, passage, rank, a finite score and tag are wanted, got {cells}"
            )
        query, passage = cells[0], cells[2]
        for kind, value, known in (("query", query, scores), ("passage", passage, collection.passages)):
            if value not in known:
                raise ValueError(f"{path}, line {number}: the collection has no {kind} {value!r}")
        if passage in scores[query]:
            raise ValueError(f"{path}, line {number}: passage {passage!r} is there twice for query {query!r}")
        if not collection.is_itself(query, passage):
            scores[query][passage] = score
    without = [query for query in collection.relevant if not scores[query]]
    if without:
        raise ValueError(f"{path} has no candidates for {len(without)} judged queries, such as {without[0]!r}")
    best = {query: dict(sorted(scores[query].items(), key=lambda scored: -scored[1])) for query in collection.relevant}
    return _first_of(collection, best, top_k, f"the first {top_k} of {path.name}")


def _first_of(collection: Collection, best: Mapping[str, Mapping[str, float]], top_k: int, source: str) -> Candidates:
    """Return the first `top_k` candidates of each query.

    Args:
        best: id of each query to {passage id: score}, best first.
        source: description of the lists.
    """
    first = {query: list(scores.items())[:top_k] for query, scores in best.items()}
    passages = {query: [passage for passage, _ in scored] for query, scored in first.items()}
    return Candidates(
        collection, passages, source, {query: [score for _, score in scored] for query, scored in first.items()}
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
