"""Rows of a file or of standard input: objects or arrays in JSON Lines, or texts between tabs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.inference.fusion import as_first_stage_score
from flagembedding_matryoshka.inference.inputs import excerpt
from flagembedding_matryoshka.text.lines import encoding_fault, parse, read_items

Row = dict[str, Any]


def read(path: Path, as_row: Callable[[Any], Row]) -> Iterator[Row]:
    """The rows of a file, one at a time.

    A file is of tab-separated texts if it is called .tsv, or neither .json nor .jsonl and does not begin with { or [.

    Args:
        path: `STANDARD_INPUT` is standard input.
        as_row: makes a row of an object or a list, or raises ValueError.

    Raises:
        ValueError: naming file and line of the first that is wrong.
    """
    items = read_items(path)
    first = next(items, None)
    if first is None:
        return
    is_json = path.suffix in (".json", ".jsonl") or (path.suffix != ".tsv" and first[1].lstrip()[0] in "{[")
    split = parse if is_json else _between_tabs
    for number, text in chain([first], items):
        value, fault = split(text)
        try:
            row = {} if fault else as_row(value)
        except ValueError as error:
            fault = str(error)
        if fault or (fault := _number_fault(row)):
            raise ValueError(f"{path}, line {number}: {fault}")
        yield row


def as_pair(value: Any) -> Row:
    """A row with `query` and either `passage` or `document`, strings, of an object or of a list of the two; an object
    may have an `instruction`, a string or None.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, list):
        if len(value) != 2:
            raise ValueError(f"a query and a passage are wanted, got {len(value)} values: {excerpt(value)}")
        value = {"query": value[0], "passage": value[1]}
    row = _with_query(value)
    name = name_of(row, PASSAGE)
    if not isinstance(row[name], str):
        raise ValueError(f"{name} must be a string, got {excerpt(row[name])}")
    return row


def as_list(value: Any) -> Row:
    """A row with `query` and either `documents` or `passages`, each of them a string or an object with a string `text`,
    of an object or of a list of a query and its documents; an object may have an `instruction`, a string or None.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, list):
        if not value:
            raise ValueError("a query and its documents are wanted, got an empty array")
        value = {"query": value[0], "documents": value[1:]}
    row = _with_query(value)
    name = name_of(row, DOCUMENTS)
    if not isinstance(row[name], list):
        raise ValueError(f"{name} must be a list, got {excerpt(row[name])}")
    for index, document in enumerate(row[name]):
        if not isinstance(text_of(document), str):
            raise ValueError(f"document {index} must be a string or an object with a text, got {excerpt(document)}")
    return row


PASSAGE, DOCUMENTS = ("passage", "document"), ("documents", "passages")


def name_of(row: Row, names: Sequence[str]) -> str:
    """Which of two names a row has.

    Raises:
        ValueError: if it has none or both.
    """
    found = [name for name in names if name in row]
    if len(found) != 1:
        raise ValueError(f"one of {' and '.join(names)} is wanted, got the names {excerpt([*row])}")
    return found[0]


def text_of(document: Any) -> Any:
    """The text of a document that is an object, or the document itself."""
    return document.get("text") if isinstance(document, dict) else document


def first_stage_scores(row: Row, field: str) -> list[float | None]:
    """Read the first stage's score of each document of a row.

    Args:
        row: a row of `as_list`.
        field: name of a list of scores in the row, or of a score in documents that are objects.

    Returns:
        a score for each document; None for null, or if the document lacks the field: the first stage did not find it.

    Raises:
        ValueError: if neither the row nor a document has the field, both have it, the number of scores in a list is not
            the number of documents, or a score is neither a finite number nor null.
    """
    documents = row[name_of(row, DOCUMENTS)]
    in_documents = [isinstance(document, dict) and field in document for document in documents]
    if field in row and any(in_documents):
        raise ValueError(f"the row and document {in_documents.index(True)} both have {field!r}: remove one of them")
    if field in row:
        values, names = row[field], f"{field!r}: value"
        if not isinstance(values, list) or len(values) != len(documents):
            raise ValueError(f"{field!r} must be a list of {len(documents)} scores, got {excerpt(values)}")
    else:
        if documents and not any(in_documents):
            raise ValueError(f"neither the row nor one of its documents has the first stage's score in {field!r}")
        values = [document.get(field) if isinstance(document, dict) else None for document in documents]
        names = f"{field!r} of document"
    try:
        return [as_first_stage_score(f"{names} {index}", value) for index, value in enumerate(values)]
    except TypeError as error:
        raise ValueError(str(error)) from error


def without(row: Row, result: str) -> Row:
    """The row, in whose line the result will be called so.

    Raises:
        ValueError: if something of the row is.
    """
    if result in row:
        raise ValueError(f"{result!r} is what the result is called, and the row has one: {excerpt(row[result])}")
    return row


def _number_fault(row: Row) -> str | None:
    """What is wrong with a row's numbers, which are written back."""
    try:
        json.dumps(row, allow_nan=False)
    except ValueError as error:
        return f"NaN and infinity are no numbers of JSON ({error})"
    return None


def _with_query(value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"an object or an array is wanted, got {excerpt(value)}")
    if not isinstance(value.get("query"), str):
        raise ValueError(f"query must be a string, got {excerpt(value.get('query'))}")
    if not isinstance(value.get("instruction"), str | None):
        raise ValueError(f"instruction must be a string, got {excerpt(value['instruction'])}")
    return value


def _between_tabs(text: str) -> tuple[list[str], str | None]:
    return text.rstrip("\r\n").split("\t"), encoding_fault(text)
