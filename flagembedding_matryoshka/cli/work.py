"""What a command computes for the rows of its input, window by window, in this process or in a worker of a cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from flagembedding_matryoshka.cli.rows import Row
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker

PAIRS_PER_WINDOW = 4096
"""A window ends with the row that brings it to this number of pairs."""


class Window(NamedTuple):
    """Consecutive rows of the input.

    Attributes:
        start: number of rows before the window.
        rows: the rows.
    """

    start: int
    rows: list[Row]


class Work(ABC):
    """The computation of one command. Each process makes its own.

    Args:
        model: name or path of the model.
        options: options of `MatryoshkaReranker`.
        call: arguments of each call of the re-ranker, and names of fields of rows that they need.
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

    def run(self, window: Window) -> list[Any]:
        """Compute the result of each row of a window.

        Raises:
            ValueError: if the re-ranker refuses a row, or a score is not a finite number.
        """
        reranker = self.reranker  # outside of try: errors of its options are not errors of rows
        try:
            return self.results(reranker, window.rows)
        except (ArithmeticError, TypeError, ValueError) as error:
            first, last = window.start + 1, window.start + len(window.rows)
            rows = f"row {first}" if first == last else f"rows {first} to {last}"
            raise ValueError(f"{rows} of the input, where row {first} is number 0: {error}") from error


def windows(kind: type[Work], rows: Iterable[Row], start: int = 0) -> Iterator[Window]:
    """Yield rows in windows of about `PAIRS_PER_WINDOW` pairs.

    Args:
        start: number of rows before the first one.
    """
    found: list[Row] = []
    pairs = 0
    for row in rows:
        found.append(row)
        pairs += max(1, kind.pairs(row))
        if pairs >= PAIRS_PER_WINDOW:
            yield Window(start, found)
            start, found, pairs = start + len(found), [], 0
    if found:
        yield Window(start, found)
