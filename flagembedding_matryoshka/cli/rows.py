"""Rows of a file or of standard input: JSON objects or arrays, texts separated by tabs, or CSV with a header."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from flagembedding_matryoshka.inference.fusion import as_first_stage_score
from flagembedding_matryoshka.inference.inputs import excerpt
from flagembedding_matryoshka.text.lines import encoding_fault, format_of, open_text, parse, read_items

Row = dict[str, Any]
PASSAGE, DOCUMENTS = ("passage", "document"), ("documents", "passages")
"""Fields of a row, each with its two names."""
MAX_CELL = 2**31 - 1
"""Maximum number of characters in a cell of CSV. Python's default is 131,072."""


def read(path: Path, as_row: Callable[[Any], Row]) -> Iterator[Row]:
    """Yield the rows of a file, one at a time.

    The format follows from the suffix, without a last .gz: .jsonl, .json, .csv with a header, or .tsv without one. A
    file with another suffix is JSON Lines if it begins with { or [, and otherwise tab-separated.

    Args:
        path: the file; `STANDARD_INPUT` is standard input.
        as_row: makes a row of an object or a list, or raises ValueError.

    Raises:
        ValueError: naming file and line of the first fault.
    """
    for number, value, fault in _values(path):
        try:
            row = {} if fault else as_row(value)
        except ValueError as error:
            fault = str(error)
        if fault or (fault := _number_fault(row)):
            raise ValueError(f"{path}, line {number}: {fault}")
        yield row


def _values(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """Yield the line, the value and the fault of each row; a fault is None if there is none."""
    suffix = format_of(path)
    if suffix == ".csv":
        for number, cells in _csv_rows(path):
            yield number, cells, next(filter(None, map(encoding_fault, cells.values())), None)
        return
    items = read_items(path)
    first = next(items, None)
    if first is None:
        return
    is_json = suffix in (".json", ".jsonl") or (suffix != ".tsv" and first[1].lstrip()[0] in "{[")
    split = parse if is_json else _between_tabs
    for number, text in chain([first], items):
        yield number, *split(text)


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the last line of each record, and {column: cell}.

    Raises:
        ValueError: naming file and line of a fault.
    """
    csv.field_size_limit(MAX_CELL)
    with open_text(path) as file:
        records = csv.reader(file, strict=True)
        try:
            header = next(records, ["query"])
            if "query" not in header or len(set(header)) < len(header):
                raise ValueError(
                    f"{path}, line {records.line_num}: the header must name each column once, query among them, got "
                    f"{excerpt(header)}"
                )
            for cells in records:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise ValueError(f"{path}, line {records.line_num}: {len(cells)} cells for {len(header)} columns")
                yield records.line_num, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}, line {records.line_num}: not CSV ({error})") from error


def as_pair(value: Any) -> Row:
    """Make a row of a query and a passage.

    Args:
        value: an object with the strings `query` and `passage` or `document`, and perhaps `instruction`, a string or
            None; or a list of query and passage.

    Raises:
        ValueError: if a field is missing or has another type.
    """
    if isinstance(value, list):
        if len(value) != 2:
            raise ValueError(f"a row must be a query and a passage, got {len(value)} values: {excerpt(value)}")
        value = {"query": value[0], "passage": value[1]}
    row = _with_query(value)
    name = name_of(row, PASSAGE)
    if not isinstance(row[name], str):
        raise ValueError(f"{name} must be a string, got {excerpt(row[name])}")
    return row


def as_list(value: Any, has_store: bool = False) -> Row:
    """Make a row of a query and its documents.

    Args:
        value: an object with the string `query` and the list `documents` or `passages`, and perhaps `instruction`, a
            string or None; or a list of query and documents. A document is a string, or an object with a string `text`.
        has_store: whether a document may also be an object with a string `id`.

    Raises:
        ValueError: if a field is missing or has another type.
    """
    if isinstance(value, list):
        if not value:
            raise ValueError("a row must be a query and its documents, got an empty array")
        value = {"query": value[0], "documents": value[1:]}
    row = _with_query(value)
    name = name_of(row, DOCUMENTS)
    if not isinstance(row[name], list):
        raise ValueError(f"{name} must be a list, got {excerpt(row[name])}")
    for index, document in enumerate(row[name]):
        text = text_of(document)
        is_stored = has_store and text is None and id_of(document) is not None
        if not isinstance(text, str) and not is_stored:
            wanted = "a text or an id" if has_store else "a text"
            raise ValueError(f"document {index} must be a string or an object with {wanted}, got {excerpt(document)}")
    return row


def name_of(row: Row, names: Sequence[str]) -> str:
    """Return the name that a field has in a row.

    Raises:
        ValueError: if the row has none of the names, or both.
    """
    found = [name for name in names if name in row]
    if len(found) != 1:
        raise ValueError(f"a row must have either {' or '.join(names)}, got the names {excerpt([*row])}")
    return found[0]


def text_of(document: Any) -> Any:
    """Return the text of a document that is an object, or the document itself."""
    return document.get("text") if isinstance(document, dict) else document


def id_of(document: Any) -> str | None:
    """Return the `id` of a document that is an object; None if it has none that is a string."""
    name = document.get("id") if isinstance(document, dict) else None
    return name if isinstance(name, str) else None


def first_stage_scores(row: Row, field: str) -> list[float | None]:
    """Read the first stage's score of each document of a row.

    Args:
        row: a row of `as_list`.
        field: name of a list of scores in the row, or of a score in documents that are objects.

    Returns:
        a score for each document; None for null, or if the document lacks the field: the first stage did not find it.

    Raises:
        ValueError: if neither the row nor a document has the field, or both have it; if a list has another number of
            scores than there are documents; or if a score is neither a finite number nor null.
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


def without_result(row: Row, result: str) -> Row:
    """Return a row. Raise ValueError if it has a field with the name of the result."""
    if result in row:
        raise ValueError(f"the row has a field {result!r}, the name of the result: rename it ({excerpt(row[result])})")
    return row


def _number_fault(row: Row) -> str | None:
    """Return the fault of a row with a number that JSON cannot write back; None if there is none."""
    try:
        json.dumps(row, allow_nan=False)
    except ValueError as error:
        return f"NaN and infinity are not JSON numbers ({error})"
    return None


def _with_query(value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"a row must be an object or an array, got {excerpt(value)}")
    if not isinstance(value.get("query"), str):
        raise ValueError(f"query must be a string, got {excerpt(value.get('query'))}")
    if not isinstance(value.get("instruction"), str | None):
        raise ValueError(f"instruction must be a string, got {excerpt(value['instruction'])}")
    return value


def _between_tabs(text: str) -> tuple[list[str], str | None]:
    """Return the texts of a tab-separated line, and its fault; None if there is none."""
    cells = text.rstrip("\r\n").split("\t")
    no_tab = "no tab separates a query from its texts. Files of JSON Lines are called .jsonl, CSV with a header .csv"
    return cells, encoding_fault(text) or (no_tab if len(cells) == 1 else None)
