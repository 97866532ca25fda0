"""What callers hand in, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

Pair = Sequence[str]


def as_pairs(sentence_pairs: Iterable[Pair] | Pair) -> list[tuple[str, str]]:
    """Pairs of strings of any iterable, which is read once; a single pair becomes a list of one.

    Raises:
        TypeError: naming the first thing that is not a pair of strings, and where it stands.
    """
    pairs = _as_list("pairs of query and passage", sentence_pairs)
    if len(pairs) == 2 and isinstance(pairs[0], str):
        pairs = [pairs]
    found = []
    for index, pair in enumerate(pairs):
        try:
            query, passage = _as_list(f"pair {index}", pair)
        except (TypeError, ValueError) as error:
            raise TypeError(f"pair {index} must be a query and a passage, got {excerpt(pair)}.") from error
        for name, text in (("query", query), ("passage", passage)):
            if not isinstance(text, str):
                raise TypeError(f"the {name} of pair {index} must be a string, got {excerpt(text)}.")
        found.append((query, passage))
    return found


def as_lists(queries: Iterable[str], candidates: Iterable[Iterable[str]]) -> tuple[list[str], list[list[str]]]:
    """Queries with a list of documents each, from any iterables, which are read once.

    Raises:
        TypeError: if something is no list of strings, naming where it stands.
        ValueError: if there are not as many lists as queries.
    """
    queries = _as_list("queries", queries)
    lists = [
        _as_list(f"the documents of query {number}", documents)
        for number, documents in enumerate(_as_list("candidates", candidates))
    ]
    if len(queries) != len(lists):
        raise ValueError(f"{len(lists)} lists of candidates need a list of as many queries, got {len(queries)}.")
    for number, (query, documents) in enumerate(zip(queries, lists, strict=True)):
        if not isinstance(query, str):
            raise TypeError(f"query {number} must be a string, got {excerpt(query)}.")
        for index, document in enumerate(documents):
            if not isinstance(document, str):
                raise TypeError(f"document {index} of query {number} must be a string, got {excerpt(document)}.")
    return queries, lists


def excerpt(value: object) -> str:
    """How an error shows a value."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _as_list(name: str, values: Any) -> list[Any]:
    """The items of an iterable whose order means something; a table's or a dict's are the names of what it holds.

    Raises:
        TypeError: if it is a string, a mapping, a set, a table of columns or no iterable.
    """
    is_table = hasattr(values, "columns")  # pandas, polars, pyarrow
    if isinstance(values, str | bytes | Mapping | Set) or is_table or not isinstance(values, Iterable):
        kind = "the string" if isinstance(values, str) else f"the {type(values).__name__}"
        raise TypeError(f"{name} must be a list, got {kind} {excerpt(values)}.")
    return list(values)
