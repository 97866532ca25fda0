"""A file window after window, in one process or on a cluster: what `rank` and `score` have in common."""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from tqdm import tqdm

from flagembedding_matryoshka.cli.output import Output, open_output
from flagembedding_matryoshka.cli.rows import Row, read, without
from flagembedding_matryoshka.inference.arguments import add_reranker, given_options
from flagembedding_matryoshka.inference.fingerprint import identity
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.text.lines import STANDARD_INPUT, parse

PAIRS_AT_ONCE = 4096
"""Of a window, which ends with the row that has the last of them."""
SPEED_ALONE = ("batch_size", "max_tokens_per_batch", "devices", "cache_dir")
"""Options that another part of the same output may be written with."""


class Window(NamedTuple):
    """Rows of the input, and how many are before them."""

    start: int
    rows: list[Row]


class Job(ABC):
    """What is done with the rows of a file; each process that does it makes one for itself.

    Args:
        options: of `MatryoshkaReranker`.
        call: arguments of each of its calls, and the fields of rows that they need.
    """

    result: ClassVar[str]
    """What the result of a row is called in its line of the output."""

    def __init__(self, model: str, options: dict[str, Any], call: dict[str, Any]) -> None:
        self.model = model
        self.options = options
        self.call = call

    @cached_property
    def reranker(self) -> MatryoshkaReranker:
        """The re-ranker, loaded at first use, so that Ray passes its errors on unchanged, as errors of the work."""
        return MatryoshkaReranker(self.model, **self.options)

    @staticmethod
    @abstractmethod
    def as_row(value: Any, call: Mapping[str, Any]) -> Row:
        """Return a row of a JSON value or a list of texts. Raises ValueError if it lacks a field that `call` needs."""

    @staticmethod
    @abstractmethod
    def pairs(row: Row) -> int:
        """How many are scored for a row."""

    @staticmethod
    @abstractmethod
    def kept(row: Row) -> Row:
        """What a row's line of the output begins with."""

    @abstractmethod
    def results(self, reranker: MatryoshkaReranker, rows: list[Row]) -> list[Any]:
        """The result of each row."""

    def run(self, window: Window) -> list[Any]:
        """The same of a window.

        Raises:
            ValueError: if the re-ranker refuses a row, or gives something that is no number.
        """
        reranker = self.reranker  # outside of try: errors of its options name no rows
        try:
            return self.results(reranker, window.rows)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"among the rows behind row {window.start}, counted from 0 there: {error}") from error


def add_files(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Add the options of input, output and the re-ranker.

    Args:
        without: options of `MatryoshkaReranker` that the command does not have.
    """
    parser.add_argument("--input", type=Path, default=STANDARD_INPUT, help="default: %(default)s, standard input")
    parser.add_argument(
        "--output",
        type=Path,
        default=STANDARD_INPUT,
        help="JSON Lines; a file that is there is continued (default: %(default)s, standard output)",
    )
    parser.add_argument(
        "--ray",
        type=int,
        nargs="?",
        const=0,
        metavar="WORKERS",
        help="on a Ray cluster, or one that is started on this machine, with so many workers; without a number, one "
        "for each of its GPUs or, if it has none, CPUs",
    )
    add_reranker(parser, without=without)


def run_job(
    parser: argparse.ArgumentParser, kind: type[Job], options: argparse.Namespace, call: dict[str, Any]
) -> None:
    """Read all rows, write a line for each. A file is checked before anything is computed, a pipe as it comes.

    Raises:
        ValueError: naming file and line of what is wrong, or if the output cannot be continued.
    """
    source: Path = options.input
    if options.ray is not None and options.ray < 0:
        parser.error(f"--ray {options.ray}: so many workers cannot be")
    if source != STANDARD_INPUT and source.resolve() == options.output.resolve():
        parser.error(f"--output {options.output} is the input")
    rows = partial(read, source, lambda value: without(kind.as_row(value, call), kind.result))
    total = sum(1 for _ in rows()) if source.is_file() else None
    given = given_options(options)
    settings = {"command": kind.__name__.lower(), "model": options.model, **given, **call}
    if options.output != STANDARD_INPUT:
        settings |= identity(options.model, given, options.ray is None)
    output = open_output(options.output, {name: value for name, value in settings.items() if name not in SPEED_ALONE})
    left = rows()
    done = _pass_over(kind, output, left, options.output)
    first = next(left, None)
    if first is not None:
        waiting = windows(kind, chain([first], left), done)
        with tqdm(total=total, initial=done, desc=settings["command"], unit="row", disable=None) as progress:
            for window, results in compute(kind, (options.model, given, call), waiting, options.ray):
                output.append(map(partial(_line, kind), window.rows, results))
                progress.update(len(window.rows))


def windows(kind: type[Job], rows: Iterable[Row], start: int = 0) -> Iterator[Window]:
    """Rows, before which so many are, in windows of about `PAIRS_AT_ONCE` pairs."""
    found: list[Row] = []
    pairs = 0
    for row in rows:
        found.append(row)
        pairs += max(1, kind.pairs(row))
        if pairs >= PAIRS_AT_ONCE:
            yield Window(start, found)
            start, found, pairs = start + len(found), [], 0
    if found:
        yield Window(start, found)


def compute(
    kind: type[Job], arguments: tuple[str, dict[str, Any], dict[str, Any]], waiting: Iterator[Window], ray: int | None
) -> Iterator[tuple[Window, list[Any]]]:
    """Each window with its results, in order.

    Args:
        arguments: those of `kind`.
        ray: workers of a Ray cluster, 0 for all that it has room for; None is this process.
    """
    if ray is None:
        job = kind(*arguments)
        with job.reranker:
            for window in waiting:
                yield window, job.run(window)
    else:
        from flagembedding_matryoshka.cli.cluster import compute_on_cluster

        yield from compute_on_cluster(kind, arguments, waiting, ray)


def _line(kind: type[Job], row: Row, result: Any) -> str:
    return json.dumps(kind.kept(row) | {kind.result: result}, ensure_ascii=False)


def _pass_over(kind: type[Job], output: Output, rows: Iterator[Row], path: Path) -> int:
    """Read the rows whose lines are there, and return how many.

    Raises:
        ValueError: if a line is not of its row.
    """
    number = 0
    for number, line in enumerate(output.lines(), start=1):
        row = next(rows, None)
        if row is None:
            raise ValueError(f"{path} has more lines than the input has rows: it is of another input.")
        found, _ = parse(line)
        result = found.get(kind.result) if isinstance(found, dict) else None
        if _line(kind, row, result) != line.rstrip("\n"):
            raise ValueError(f"{path}, line {number} is not of row {number} of the input: it is of another input.")
    return number
