"""Text files of any origin: encodings, compression, lines, and JSON."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# In this order, because the mark of UTF-32 begins with the mark of UTF-16.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
GZIP = b"\x1f\x8b"
STANDARD_INPUT = Path("-")
BLANK = re.compile(r"\s*")
BETWEEN = re.compile(r"\s*([,\]])\s*")

Check = Callable[[dict[str, Any]], str | None]
"""Returns the fault of an object; None if there is none."""


class Row(NamedTuple):
    """An object of a file, or its fault.

    Attributes:
        number: number of its first line, from 1.
        value: the object; None if there is a fault.
        fault: description of the fault; None if there is none.
    """

    number: int
    value: dict[str, Any] | None
    fault: str | None


def format_of(path: Path) -> str:
    """Return the suffix of a file's name, such as ".jsonl", without the .gz of a compressed file."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number, from 1, and text of each line that is not blank.

    The encoding is UTF-8, or with a byte order mark UTF-16 or UTF-32. Files compressed by gzip are decompressed. A pipe
    and standard input, whose path is `STANDARD_INPUT`, are read once, from their start. Bytes that are not UTF-8 become
    half surrogate pairs, which `encoding_fault` finds.

    Raises:
        ValueError: if a file in UTF-16 or UTF-32 ends within a character, or a compressed file is damaged.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield number, line


def good_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield lines as `read_lines`.

    Raises:
        ValueError: as `read_lines`, and naming file and line of the first line that cannot be written as UTF-8.
    """
    for number, text in read_lines(path):
        if fault := encoding_fault(text):
            raise ValueError(f"{path}, line {number}: {fault}")
        yield number, text


def encoding_fault(text: str) -> str | None:
    """Return the fault of a text that cannot be written as UTF-8; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, before = ord(text[error.start]), text[max(0, error.start - 20) : error.start]
        if 0xDC80 <= code <= 0xDCFF:
            return f"not UTF-8: byte 0x{code - 0xDC00:02X} after {before!r}. Convert the file, with iconv for example"
        return f"half a surrogate pair, U+{code:04X}, after {before!r}"
    return None


def read_rows(path: Path, check: Check) -> Iterator[Row]:
    """Yield the objects of a file: JSON Lines, or an array if its name ends in .json. Blank lines are skipped.

    Args:
        check: returns the fault of an object; None if there is none.

    Raises:
        ValueError: if an array is not JSON, so that the rest cannot be read.
    """
    for number, text in read_items(path):
        value, fault = parse(text)
        if fault is None and not isinstance(value, dict):
            fault = f"a row must be a JSON object, got {text.strip():.80}"
        fault = fault or check(value)
        yield Row(number, None if fault else value, fault)


def good_rows(path: Path, check: Check) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, as `read_rows`.

    Raises:
        ValueError: naming file and line of the first fault.
    """
    for number, value, fault in read_rows(path, check):
        if value is None:
            raise ValueError(f"{path}, line {number}: {fault}")
        yield value


def read_items(path: Path) -> Iterator[tuple[int, str]]:
    """Yield first line and text of each value of a file: JSON Lines, or an array if its name ends in .json.

    Raises:
        ValueError: as `read_lines`, and if an array is not JSON.
    """
    return _array(path) if _is_array(path) else read_lines(path)


def parse(text: str) -> tuple[Any, str | None]:
    """Return a value in JSON, and its fault; None if there is none."""
    if not text.isascii() and (fault := encoding_fault(text)):
        return None, fault
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = ". Is it UTF-16 without a byte order mark?" if "\0" in text else ""
        return None, f"not JSON ({error}){hint}"
    # In a text that is UTF-8 only an escape can hold half a surrogate pair.
    return value, encoding_fault(json.dumps(value, ensure_ascii=False)) if "\\u" in text else None


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a file as `read_lines`, to be read as text.

    Raises:
        ValueError: as `read_lines`, when the context is left.
    """
    is_pipe = path == STANDARD_INPUT
    try:
        with io.FileIO(0 if is_pipe else path, closefd=not is_pipe) as raw:
            file = io.BufferedReader(raw)
            if file.peek(2).startswith(GZIP):
                file = io.BufferedReader(gzip.GzipFile(fileobj=file))  # type: ignore[arg-type]
            start = file.peek(4)
            encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
            errors = "surrogateescape" if "8" in encoding else "surrogatepass"
            # JSON's lines end with \n only, not with the other line breaks of Unicode or with those of old Macs.
            with io.TextIOWrapper(file, encoding=encoding, newline="\n", errors=errors) as text:
                yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} begins with the byte order mark of {error.encoding} and is not: {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is compressed by gzip and damaged: {error}") from error


def _is_array(path: Path) -> bool:
    return format_of(path) == ".json" and next(read_lines(path), (0, ""))[1].lstrip().startswith("[")


def _array(path: Path) -> Iterator[tuple[int, str]]:
    """Yield first line and text of each item of an array."""
    with open_text(path) as file:
        text = file.read()
    decoder = json.JSONDecoder()
    place = BLANK.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    ends = text.startswith("]", place)
    place += ends
    number, counted = 1, 0
    while not ends:
        try:
            _, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a JSON array: {error}") from error
        number += text.count("\n", counted, place)
        counted = place
        yield number, text[place:end]
        separator = BETWEEN.match(text, end)
        if separator is None:
            line = number + text.count("\n", place, end)
            raise ValueError(f"{path}, line {line}: an item must be followed by , or ], got {text[end : end + 40]!r}")
        ends, place = separator[1] == "]", separator.end()
    if rest := text[place:].strip():
        raise ValueError(f"{path} has text after its array: {rest:.40}")
