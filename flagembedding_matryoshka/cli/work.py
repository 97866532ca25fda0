"""Computation of a command, window by window of its input, in this process or in a worker of a cluster."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from flagembedding_matryoshka.cli.rows import Row
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker

PAIRS_PER_WINDOW = 4096
"""Maximum number of pairs of a window. The last row of a window may exceed it."""
FIRST_PAIRS = 128
"""Pairs of the first window, whose time is not known yet."""
SECONDS_PER_WINDOW = 20.0
"""Time of a window with less than `PAIRS_PER_WINDOW` pairs. A stopped process loses at most about this work."""


class RowWindow(NamedTuple):
    """Consecutive rows of the input.

    Attributes:
        start: number of rows before the window.
        rows: the rows.
    """

    start: int
    rows: list[Row]

    def __str__(self) -> str:
        """Return the rows' numbers in the input, from 1."""
        first, last = self.start + 1, self.start + len(self.rows)
        return f"row {first}" if first == last else f"rows {first} to {last}"


class Results(NamedTuple):
    """Results of the rows of a window, and the seconds that they took without the loading of the model."""

    of_rows: list[Any]
    seconds: float


class Work(ABC):
    """The computation of one command. Each process constructs its own object.

    Args:
        model: name or path of the model.
        options: options of `MatryoshkaReranker`.
        call: arguments of each call of the re-ranker, and the name of the field with the first stage's scores.
    """

    result: ClassVar[str]
    """Name of the result in a line of the output."""

    def __init__(self, model: str, options: dict[str, Any], call: dict[str, Any]) -> None:
        self.model = model
        self.options = options
        self.call = call

    @cached_property
    def reranker(self) -> MatryoshkaReranker:
        """The re-ranker. It is loaded at first use, because Ray reports errors of a constructor in another form."""
        return MatryoshkaReranker(self.model, **self.options)

    @staticmethod
    @abstractmethod
    def as_row(value: Any, call: Mapping[str, Any]) -> Row:
        """Return a row of a JSON value or a list of texts. Raises ValueError if it lacks a field that `call` needs."""

    @staticmethod
    @abstractmethod
    def pairs(row: Row) -> int:
        """Return the number of pairs that a row has."""

    @staticmethod
    @abstractmethod
    def kept(row: Row) -> Row:
        """Return the fields of a row that its line of the output repeats."""

    @abstractmethod
    def results(self, reranker: MatryoshkaReranker, rows: list[Row]) -> list[Any]:
        """Compute the result of each row."""

    def run(self, window: RowWindow) -> Results:
        """Compute the result of each row of a window.

        Raises:
            ValueError: if the re-ranker refuses a row, or a score is not a finite number. It names the first such row.
                To find it, each half of the window is computed by itself, and so on. If no half fails alone, the error
                names all rows of the window.
        """
        reranker = self.reranker  # outside of try: errors of its options are not errors of rows
        start = time.monotonic()
        try:
            return Results(self.results(reranker, window.rows), time.monotonic() - start)
        except (ArithmeticError, TypeError, ValueError) as error:
            if len(window.rows) > 1:
                half = len(window.rows) // 2
                self.run(RowWindow(window.start, window.rows[:half]))
                self.run(RowWindow(window.start + half, window.rows[half:]))
            raise ValueError(f"{window} of the input: {error}") from error


class RowWindows(Iterator[RowWindow]):
    """Divide the rows of an input into windows, by number of pairs and by time.

    A window ends with the row that reaches its number of pairs, a power of two. The number is at most
    `PAIRS_PER_WINDOW`, at most twice that of the last timed window, and its time is expected to be at most
    `SECONDS_PER_WINDOW`.

    Args:
        kind: the work.
        rows: the rows.
        start: number of rows before the first one.
    """

    def __init__(self, kind: type[Work], rows: Iterable[Row], start: int = 0) -> None:
        self.kind = kind
        self.pairs = FIRST_PAIRS
        self._rows = iter(rows)
        self._start = start

    def __next__(self) -> RowWindow:
        limit = min(self.pairs, PAIRS_PER_WINDOW)
        rows: list[Row] = []
        pairs = 0
        while pairs < limit and (row := next(self._rows, None)) is not None:
            rows.append(row)
            pairs += self._pairs(row)
        if not rows:
            raise StopIteration
        window = RowWindow(self._start, rows)
        self._start += len(rows)
        return window

    def adapt(self, window: RowWindow, seconds: float) -> None:
        """Choose the number of pairs of the next windows by the time of a window."""
        pairs = sum(map(self._pairs, window.rows))
        fitting = int(pairs * SECONDS_PER_WINDOW / max(seconds, 1e-9))
        self.pairs = max(1, min(fitting, 2 * pairs, PAIRS_PER_WINDOW))
        self.pairs = 1 << self.pairs.bit_length() - 1

    def _pairs(self, row: Row) -> int:
        return max(1, self.kind.pairs(row))
