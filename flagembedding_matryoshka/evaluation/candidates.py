"""Candidates that every setting re-ranks, from BM25 or a TREC run, and the two halves of their queries."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from flagembedding_matryoshka.inference.fusion import as_first_stage
from flagembedding_matryoshka.mining.bm25 import BM25
from flagembedding_matryoshka.text.collections import Collection
from flagembedding_matryoshka.text.lines import good_lines

logger = logging.getLogger(__name__)

T = TypeVar("T")
MIN_QUERIES = 25
"""With fewer queries in a half, a warning says that the choice depends on chance."""


@dataclass(frozen=True)
class Candidates:
    """Lists of candidates.

    Attributes:
        collection: texts and judgements.
        passages: id of each query with a relevant passage, to the ids of its candidates, best first.
        source: name of the first stage.
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
                raise ValueError(f"the id {name!r} has white space or is empty, which a TREC run does not allow")

    def __len__(self) -> int:
        """Number of pairs."""
        return sum(map(len, self.passages.values()))

    def texts(self, query: str) -> list[str]:
        """Return the texts of a query's candidates, in order."""
        return [self.collection.passages[passage] for passage in self.passages[query]]

    def pairs(self, queries: list[str]) -> list[tuple[str, str]]:
        """Return pairs of query text and passage text for the lists of some queries."""
        return [(self.collection.queries[query], text) for query in queries for text in self.texts(query)]

    def batches(self, queries: list[str], pairs: int) -> Iterator[list[str]]:
        """Yield batches of neighbouring queries, each the shortest with at least `pairs` candidates."""
        batch: list[str] = []
        size = 0
        for query in queries:
            batch.append(query)
            size += len(self.passages[query])
            if size >= pairs:
                yield batch
                batch, size = [], 0
        if size:
            yield batch

    def fingerprint(self) -> str:
        """Return the SHA-256 of all texts, ids and judgements that a result depends on."""
        digest = hashlib.sha256()
        for query, passages in self.passages.items():
            row = [query, self.collection.queries[query], self.collection.relevant[query], passages, self.texts(query)]
            if query in self.collection.instructions:
                row.append(self.collection.instructions[query])
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


def chooses(query: str) -> bool:
    """Return whether a query is in the choosing half. It depends on the id only, so it is the same in every sample."""
    return hashlib.sha256(query.encode()).digest()[0] % 2 == 0


@dataclass(frozen=True)
class Halves:
    """Two halves of the queries. Settings are chosen or fitted on one and reported on the other.

    On the queries that chose it, the best of many settings looks better than it is.

    Attributes:
        choosing, held_out: indices of the queries.
    """

    choosing: tuple[int, ...]
    held_out: tuple[int, ...]

    @classmethod
    def of(cls, queries: Iterable[str]) -> Halves:
        """Return the halves of queries, by the hashes of their ids."""
        sides = [chooses(query) for query in queries]
        return cls(*(tuple(index for index, side in enumerate(sides) if side is wanted) for wanted in (True, False)))

    @property
    def are_two(self) -> bool:
        """True if neither half is empty."""
        return bool(self.choosing and self.held_out)

    def check(self) -> None:
        """Warn if a half has few queries.

        Raises:
            ValueError: if a half is empty.
        """
        sizes = f"{len(self.choosing)} queries choose and {len(self.held_out)} are held out"
        if not self.are_two:
            raise ValueError(f"{sizes}, by the hashes of their ids: both halves need a query. Use more queries")
        if min(len(self.choosing), len(self.held_out)) < MIN_QUERIES:
            logger.warning("%s: with fewer than %d in a half, the choice depends on chance", sizes, MIN_QUERIES)


def take(values: Sequence[T], indices: Sequence[int]) -> list[T]:
    """Return the values at some indices."""
    return [values[index] for index in indices]


def sample_queries(collection: Collection, count: int | None, seed: int) -> Collection:
    """Return the collection with the judgements of a random sample of queries, in their order.

    Args:
        collection: the collection.
        count: number of queries; None, or a number above that of the judged queries, is all of them.
        seed: seed of the draw.
    """
    if count is None or count >= len(collection.relevant):
        return collection
    drawn = set(random.Random(seed).sample(list(collection.relevant), count))
    relevant = {query: grades for query, grades in collection.relevant.items() if query in drawn}
    return replace(collection, relevant=relevant)


def from_bm25(collection: Collection, top_k: int) -> Candidates:
    """Return BM25's first `top_k` passages of each query, without the query itself.

    A passage that shares no word with the query is no candidate. A query without candidates has the value 0 in every
    measure.
    """
    ids, queries = list(collection.passages), list(collection.relevant)
    texts = [collection.queries[query] for query in queries]
    found = BM25(list(collection.passages.values())).lists(texts, top_k + 1)
    best = {
        query: {ids[index]: score for index, score in scores.items() if not collection.is_itself(query, ids[index])}
        for query, scores in zip(queries, found, strict=True)
    }
    without = [query for query, scores in best.items() if not scores]
    if without:
        logger.warning("BM25 finds nothing for %d queries, whose measures are 0, such as %r", len(without), without[0])
    return _first_of(collection, best, top_k, f"BM25's first {top_k}")


def from_run(collection: Collection, path: Path, top_k: int) -> Candidates:
    """Return the first `top_k` passages of each query in a TREC run (query Q0 passage rank score tag), by score.

    Equal scores stay in the order of the file. The query itself is no candidate.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is malformed or names an unknown query or passage, or a judged query has no line; names
            file and line.
    """
    scores: dict[str, dict[str, float]] = {query: {} for query in collection.queries}
    for number, line in good_lines(path):
        cells = line.split()
        if len(cells) != 6 or (score := _number(cells[4])) is None:
            raise ValueError(
                f"{path}, line {number}: must be query, Q0, passage, rank, a finite score and tag, got {cells}"
            )
        query, passage = cells[0], cells[2]
        for kind, value, known in (("query", query, scores), ("passage", passage, collection.passages)):
            if value not in known:
                raise ValueError(f"{path}, line {number}: the collection has no {kind} {value!r}")
        if passage in scores[query]:
            raise ValueError(f"{path}, line {number}: query {query!r} has the passage {passage!r} twice")
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
        collection: texts and judgements.
        best: id of each query to {passage id: score}, best first.
        top_k: largest number of candidates of a query.
        source: name of the first stage.
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
