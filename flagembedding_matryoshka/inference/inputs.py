"""Checks of the arguments of a call, before anything is computed."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import zip_longest
from typing import Any, NamedTuple

from flagembedding_matryoshka.text.pairs import TokenizedPair

Pair = Sequence[str]
Inputs = Sequence[TokenizedPair]
Pairs = Sequence[tuple[str, str]] | Inputs
"""The pairs of a call are either all texts or all tokenised."""
MISSING = object()


class Passage(NamedTuple):
    """A passage of a ranking with a store: its id, its text, or both. What the caller does not give is None."""

    id: str | None
    text: str | None


def as_pairs(sentence_pairs: Iterable[Pair] | Pair | Iterable[TokenizedPair]) -> Pairs:
    """Return the pairs of an iterable, which is read once. A single pair becomes a list; tokenised pairs stay.

    Raises:
        TypeError: if a value is not a pair of strings; the error names its index.
    """
    pairs = list(as_iterable("pairs of query and passage", sentence_pairs))
    if len(pairs) == 2 and isinstance(pairs[0], str):
        pairs = [pairs]
    if pairs and all(isinstance(pair, TokenizedPair) for pair in pairs):
        return pairs
    found = []
    for index, pair in enumerate(pairs):
        try:
            query, passage = list(as_iterable(f"pair {index}", pair))
        except (TypeError, ValueError) as error:
            raise TypeError(f"pair {index} must be a query and a passage, got {excerpt(pair)}.") from error
        for name, text in (("query", query), ("passage", passage)):
            if not isinstance(text, str):
                raise TypeError(f"the {name} of pair {index} must be a string, got {excerpt(text)}.")
        found.append((query, passage))
    return found


def as_tokenized(lists: Iterable[Iterable[TokenizedPair]]) -> list[list[TokenizedPair]]:
    """Return lists of tokenised pairs.

    Raises:
        TypeError: if a value is not a tokenised pair; the error names its list and index.
    """
    found = [list(as_iterable(f"list {number}", pairs)) for number, pairs in enumerate(as_iterable("lists", lists))]
    for number, values in enumerate(found):
        for place, value in enumerate(values):
            if not isinstance(value, TokenizedPair):
                raise TypeError(f"pair {place} of list {number} must be one that tokenize made, got {excerpt(value)}.")
    return found


def as_lists(queries: Iterable[str], candidates: Iterable[Iterable[Any]]) -> tuple[list[str], list[list[str]]]:
    """Return queries and their lists of documents, from any iterables, which are read once.

    Raises:
        TypeError: if a query is not a string or its documents are not a list of strings; the error names the query.
        ValueError: if the number of lists is not the number of queries.
    """
    queries = list(as_iterable("queries", queries))
    lists = list(as_iterable("candidates", candidates))
    if len(queries) != len(lists):
        raise ValueError(f"{len(lists)} lists of candidates need a list of as many queries, got {len(queries)}.")
    return queries, [
        _as_documents(number, query, documents)
        for number, (query, documents) in enumerate(zip(queries, lists, strict=True))
    ]


def read_lists(
    queries: Iterable[str] | Iterable[tuple[str, Iterable[str]]], candidates: Iterable[Iterable[str]] | None
) -> Iterator[tuple[str, list[str]]]:
    """Yield each query with its documents, as they are read.

    Args:
        queries: the queries, or without `candidates` tuples of a query and its documents.

    Raises:
        TypeError, ValueError: as `as_lists`. Errors of a list are raised when the list is read.
    """
    if candidates is None:
        return _read(as_iterable("lists", queries))
    pairs = as_iterable("queries", queries), as_iterable("candidates", candidates)
    return _read(zip_longest(*pairs, fillvalue=MISSING))


def _read(rows: Iterable[Any]) -> Iterator[tuple[str, list[str]]]:
    for number, row in enumerate(rows):
        try:
            query, documents = row
        except (TypeError, ValueError) as error:
            raise TypeError(f"list {number} must be a query and its documents, got {excerpt(row)}.") from error
        for name, value in (("query", query), ("list of candidates", documents)):
            if value is MISSING:
                raise ValueError(
                    f"there must be as many queries as lists of candidates, but {name} {number} is missing."
                )
        yield query, _as_documents(number, query, documents)


def read_passages(
    queries: Iterable[Any],
    candidates: Iterable[Iterable[str | None]] | None,
    ids: Iterable[Iterable[str | None]],
    needs_texts: bool,
) -> Iterator[tuple[str, list[Passage]]]:
    """Yield each query with its passages, as they are read.

    Args:
        candidates: the texts of each query's passages, or None; a text may be None.
        ids: the ids of each query's passages; an id may be None.
        needs_texts: refuse a passage without a text, because it is to be returned.

    Raises:
        TypeError: if a query is not a string, or an id or a text neither a string nor None.
        ValueError: if a query has no list, or a list no query; if a query has another number of ids than of texts; or
            if a passage has neither, or lacks the text that is needed. Errors of a list are raised when it is read.
    """
    given = {"queries": queries, "ids": ids} | ({} if candidates is None else {"candidates": candidates})
    rows = zip_longest(*(as_iterable(name, values) for name, values in given.items()), fillvalue=MISSING)
    return (_as_passages(number, dict(zip(given, row, strict=True)), needs_texts) for number, row in enumerate(rows))


def _as_passages(number: int, row: dict[str, Any], needs_texts: bool) -> tuple[str, list[Passage]]:
    """Check a row of `read_passages`, and return its query and passages."""
    for name, value in row.items():
        if value is MISSING:
            raise ValueError(f"{', '.join(row)} must have the same length, but {name} ends after {number}.")
    query = row["queries"]
    if not isinstance(query, str):
        raise TypeError(f"query {number} must be a string, got {excerpt(query)}.")
    ids = _strings_or_none(number, "id", row["ids"])
    texts = _strings_or_none(number, "document", row.get("candidates", [None] * len(ids)))
    if len(ids) != len(texts):
        raise ValueError(f"query {number} has {len(ids)} ids, but {len(texts)} documents.")
    passages = [Passage(name, text) for name, text in zip(ids, texts, strict=True)]
    for place, passage in enumerate(passages):
        if passage == Passage(None, None):
            raise ValueError(f"passage {place} of query {number} has neither an id nor a text.")
        if needs_texts and passage.text is None:
            raise ValueError(
                f"return_documents needs the text of passage {place} of query {number}, which has an id alone."
            )
    return query, passages


def _strings_or_none(number: int, name: str, values: Any) -> list[str | None]:
    found = list(as_iterable(f"the {name}s of query {number}", values))
    for place, value in enumerate(found):
        if not isinstance(value, str | None):
            raise TypeError(f"{name} {place} of query {number} must be a string or None, got {excerpt(value)}.")
    return found


def as_count(name: str, value: Any, otherwise: str = "") -> int:
    """Return a number that must be at least 1.

    Args:
        otherwise: other allowed values, for the error.

    Raises:
        TypeError: if the value is not an int.
        ValueError: if it is less than 1.
    """
    try:
        if isinstance(value, bool):
            raise TypeError("bool")
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an int{otherwise}, got {excerpt(value)}.") from error
    if number < 1:
        raise ValueError(f"{name} is {value}, but must be at least 1{otherwise}.")
    return number


def excerpt(value: object) -> str:
    """Return a value as an error shows it, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _as_documents(number: int, query: Any, documents: Any) -> list[str]:
    """Check a query and its documents, and return the documents."""
    documents = list(as_iterable(f"the documents of query {number}", documents))
    if not isinstance(query, str):
        raise TypeError(f"query {number} must be a string, got {excerpt(query)}.")
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise TypeError(f"document {index} of query {number} must be a string, got {excerpt(document)}.")
    return documents


def as_iterable(name: str, values: Any) -> Iterable[Any]:
    """Return an iterable that has an order. The items of a table or a dict would be names of columns or keys.

    Raises:
        TypeError: if it is a string, a mapping, a set, a table of columns or no iterable.
    """
    is_table = hasattr(values, "columns")  # pandas, polars, pyarrow
    if isinstance(values, str | bytes | Mapping | Set) or is_table or not isinstance(values, Iterable):
        kind = "the string" if isinstance(values, str) else f"the {type(values).__name__}"
        raise TypeError(f"{name} must be a list, got {kind} {excerpt(values)}.")
    return values
