"""What callers hand in, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Pair = Sequence[str]


def as_pairs(sentence_pairs: Sequence[Pair] | Pair) -> list[tuple[str, str]]:
    """Pairs of strings; a single pair becomes a list of one.

    Raises:
        TypeError: naming the first thing that is not a pair of strings, and where it stands.
    """
    if isinstance(sentence_pairs, str):
        raise TypeError(f"pairs of query and passage are wanted, got the string {excerpt(sentence_pairs)}.")
    pairs: list[Any] = list(sentence_pairs)
    if len(pairs) == 2 and isinstance(pairs[0], str):
        pairs = [pairs]
    for index, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"pair {index} must be a query and a passage, got {excerpt(pair)}.")
        for name, text in zip(("query", "passage"), pair, strict=True):
            if not isinstance(text, str):
                raise TypeError(f"the {name} of pair {index} must be a string, got {excerpt(text)}.")
    return [(query, passage) for query, passage in pairs]


def as_lists(queries: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """The pairs of queries with a list of documents each, query after query.

    Raises:
        TypeError: if a list of documents is a string.
        ValueError: if there are not as many lists as queries.
    """
    if isinstance(queries, str) or len(queries) != len(candidates):
        raise ValueError(f"{len(candidates)} lists of candidates need a list of as many queries.")
    for documents in candidates:
        if isinstance(documents, str):
            raise TypeError(f"documents must be a list of strings, got the string {excerpt(documents)}.")
    return [(query, document) for query, documents in zip(queries, candidates, strict=True) for document in documents]


def excerpt(value: object) -> str:
    """How an error shows a value."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
