"""Text files that come from anywhere: their encodings, their lines, and the JSON in them."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# The mark of UTF-32 begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
STANDARD_INPUT = Path("-")
BLANK = re.compile(r"\s*")
BETWEEN = re.compile(r"\s*([,\]])\s*")

Check = Callable[[dict[str, Any]], str | None]
"""Says what is wrong with an object, None if nothing is."""


class Row(NamedTuple):
    """An object of a file, or what is wrong in its place.

    Attributes:
        number: of its line, from 1.
        value: the object; None where there is a fault.
        fault: what is wrong; None where nothing is.
    """

    number: int
    value: dict[str, Any] | None
    fault: str | None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank, in UTF-8, or UTF-16 or UTF-32 with its mark in front.

    A pipe is read once, from its start, and so is standard input, whose path is `STANDARD_INPUT`.

    Bytes that are not UTF-8 become half surrogate pairs, which `encoding_fault` finds.

    Raises:
        ValueError: if a file in UTF-16 or UTF-32 is cut off in the middle of a character.
    """
    with _open(path) as file, _decoding(path):
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield number, line


def good_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The same.

    Raises:
        ValueError: beside that, naming file and line of the first that cannot be written as UTF-8.
    """
    for number, text in read_lines(path):
        if fault := encoding_fault(text):
            raise ValueError(f"{path}, line {number}: {fault}")
        yield number, text


def encoding_fault(text: str) -> str | None:
    """What is wrong with characters that cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code, before = ord(text[error.start]), text[max(0, error.start - 20) : error.start]
        if 0xDC80 <= code <= 0xDCFF:
            return f"not UTF-8: byte 0x{code - 0xDC00:02X} behind {before!r}. Convert the file with iconv, say"
        return f"half a surrogate pair, U+{code:04X}, behind {before!r}"
    return None


def read_rows(path: Path, check: Check) -> Iterator[Row]:
    """The objects of a file, JSON Lines or, if it is called .json, an array; blank lines are passed over.

    Args:
        check: what objects must be beyond that.

    Raises:
        ValueError: if an array is no JSON, behind which nothing can be read.
    """
    for number, text in read_items(path):
        value, fault = parse(text)
        if fault is None and not isinstance(value, dict):
            fault = f"an object is wanted, got {text.strip():.80}"
        fault = fault or check(value)
        yield Row(number, None if fault else value, fault)


def good_rows(path: Path, check: Check) -> Iterator[dict[str, Any]]:
    """The objects of a file.

    Raises:
        ValueError: naming file and line of the first that is wrong.
    """
    for number, value, fault in read_rows(path, check):
        if value is None:
            raise ValueError(f"{path}, line {number}: {fault}")
        yield value


def read_items(path: Path) -> Iterator[tuple[int, str]]:
    """Number of the first line and text of each value of a file, JSON Lines or, if it is called .json, an array.

    Raises:
        ValueError: as `read_lines`, and if an array is no JSON.
    """
    return _array(path) if _is_array(path) else read_lines(path)


def parse(text: str) -> tuple[Any, str | None]:
    """A value in JSON, and what is wrong with it; None if nothing is."""
    if not text.isascii() and (fault := encoding_fault(text)):
        return None, fault
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = ". Is it UTF-16 without a mark in front?" if "\0" in text else ""
        return None, f"not JSON ({error}){hint}"
    # Only an escape can hide what is no character in a text that is UTF-8.
    return value, encoding_fault(json.dumps(value, ensure_ascii=False)) if "\\u" in text else None


def _open(path: Path) -> io.TextIOWrapper:
    is_pipe = path == STANDARD_INPUT
    file = io.BufferedReader(io.FileIO(0 if is_pipe else path, closefd=not is_pipe))
    start = file.peek(4)
    encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
    # Not every line break of Unicode ends a line of JSON, nor does that of old Macs.
    errors = "surrogateescape" if "8" in encoding else "surrogatepass"
    return io.TextIOWrapper(file, encoding=encoding, newline="\n", errors=errors)


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not the {error.encoding} that its first bytes say it is: {error}") from error


def _is_array(path: Path) -> bool:
    return path.suffix == ".json" and next(read_lines(path), (0, ""))[1].lstrip().startswith("[")


def _array(path: Path) -> Iterator[tuple[int, str]]:
    """Number of the first line and text of each item of an array."""
    with _open(path) as file, _decoding(path):
        text = file.read()
    decoder = json.JSONDecoder()
    place = BLANK.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    ends = text.startswith("]", place)
    place += ends
    number, counted = 1, 0
    while not ends:
        try:
            _, behind = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON array: {error}") from error
        number += text.count("\n", counted, place)
        counted = place
        yield number, text[place:behind]
        separator = BETWEEN.match(text, behind)
        if separator is None:
            line = number + text.count("\n", place, behind)
            raise ValueError(
                f"{path}, line {line}: , or ] is wanted behind an item, got {text[behind : behind + 40]!r}"
            )
        ends, place = separator[1] == "]", separator.end()
    if rest := text[place:].strip():
        raise ValueError(f"{path} goes on behind its array: {rest:.40}")
