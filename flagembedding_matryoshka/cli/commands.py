"""The commands `rank` and `score`: their common options, and the loop from input to output."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from flagembedding_matryoshka.cli.output import Output, open_output
from flagembedding_matryoshka.cli.rows import Row, read, without_result
from flagembedding_matryoshka.cli.work import RowWindow, RowWindows, Work
from flagembedding_matryoshka.inference.arguments import add_reranker, given_options
from flagembedding_matryoshka.inference.fingerprint import resolved_dtype, weights_of
from flagembedding_matryoshka.text.lines import STANDARD_INPUT, parse

if TYPE_CHECKING:
    from flagembedding_matryoshka.cli.cluster import Cluster

NOT_COMPARED = ("batch_size", "max_tokens_per_batch", "devices", "cache_dir", "token", "local_files_only")
"""Options that do not change results: runs that differ in them may continue each other's output."""

DTYPE_FLAGS = ("use_fp16", "use_bf16")
"""Further options that choose a dtype."""


def add_files(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Add the options of input, output and the re-ranker.

    Args:
        without: options of `MatryoshkaReranker` that the command does not have.
    """
    parser.add_argument(
        "--input", type=Path, default=STANDARD_INPUT, help="file to read; - is standard input (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=STANDARD_INPUT,
        help="file of JSON Lines to write; - is standard output. If the file exists, the run resumes after its last "
        "complete line (default: %(default)s)",
    )
    parser.add_argument(
        "--ray",
        type=int,
        nargs="?",
        const=0,
        metavar="WORKERS",
        help="compute with this number of workers of a Ray cluster, or of one that is started on this machine. "
        "Without a number: one worker for each GPU, or for each CPU if there is no GPU (default: this process)",
    )
    add_reranker(parser, without=without)


def run(parser: argparse.ArgumentParser, kind: type[Work], options: argparse.Namespace, call: dict[str, Any]) -> None:
    """Read all rows and write a line for each. A file is checked before anything is computed, a pipe while it is read.

    Args:
        parser: the parser, which ends the process if options contradict each other.
        kind: the computation.
        options: the command line.
        call: arguments of `kind`.

    Raises:
        FileNotFoundError: if the input does not exist.
        ValueError: if a row is wrong, with file and line; or if the output was written with other settings or from
            another input.
    """
    source: Path = options.input
    if options.ray is not None and options.ray < 0:
        parser.error(f"--ray {options.ray}: the number of workers must be at least 0")
    if source != STANDARD_INPUT and source.resolve() == options.output.resolve():
        parser.error(f"--output {options.output} is the input: name another file")
    if source != STANDARD_INPUT and not source.exists():
        raise FileNotFoundError(f"--input {source} does not exist")
    rows = partial(read, source, lambda value: without_result(kind.as_row(value, call), kind.result))
    total = sum(1 for _ in rows()) if source.is_file() else None
    given = given_options(options)
    settings = {"command": kind.__name__.lower(), "model": options.model, **given, **call}
    standard_output = sys.stdout
    # Ray and other packages print, and must not print between the lines of the output.
    with redirect_stdout(sys.stderr), _cluster(options.ray) as cluster:
        if options.output != STANDARD_INPUT:
            settings["weights"] = weights_of(options.model, given)
        settings["resolved_dtype"] = _dtype(given, cluster)
        if cluster is not None:  # all workers load the same dtype, whatever their devices
            given = {name: value for name, value in given.items() if name not in DTYPE_FLAGS}
            given["dtype"] = settings["resolved_dtype"]
        compared = {name: settings[name] for name in settings if name not in NOT_COMPARED}
        output = open_output(options.output, compared, standard_output)
        remaining = rows()
        done = _skip_done(kind, output, remaining, options.output)
        first = next(remaining, None)
        if first is not None:
            waiting = RowWindows(kind, chain([first], remaining), done)
            with tqdm(total=total, initial=done, desc=settings["command"], unit="row", disable=None) as progress:
                for window, results in compute(kind, (options.model, given, call), waiting, cluster):
                    output.append(map(partial(_line, kind), window.rows, results))
                    progress.update(len(window.rows))


def compute(
    kind: type[Work],
    arguments: tuple[str, dict[str, Any], dict[str, Any]],
    waiting: RowWindows,
    cluster: Cluster | None,
) -> Iterator[tuple[RowWindow, list[Any]]]:
    """Yield each window with its results, in order. The size of windows follows their time.

    Args:
        arguments: arguments of `kind`.
        waiting: the windows.
        cluster: None is this process.
    """
    if cluster is not None:
        yield from cluster.compute(kind, arguments, waiting)
        return
    work = kind(*arguments)
    with work.reranker:
        for window in waiting:
            results, seconds = work.run(window)
            waiting.adapt(window, seconds)
            yield window, results


def _dtype(given: dict[str, Any], cluster: Cluster | None) -> str:
    """Return the dtype that weights are loaded in. Only if it depends on the device, a worker is asked."""
    is_named = given.get("dtype", "auto") != "auto" and not any(name in given for name in DTYPE_FLAGS)
    return resolved_dtype(given) if cluster is None or is_named else cluster.resolved_dtype(given)


def _cluster(workers: int | None) -> AbstractContextManager[Cluster | None]:
    """Return a cluster with this number of workers; None if `workers` is None."""
    if workers is None:
        return nullcontext()
    from flagembedding_matryoshka.cli.cluster import Cluster  # needs an extra

    return Cluster(workers)


def _line(kind: type[Work], row: Row, result: Any) -> str:
    return json.dumps(kind.kept(row) | {kind.result: result}, ensure_ascii=False)


def _skip_done(kind: type[Work], output: Output, rows: Iterator[Row], path: Path) -> int:
    """Read the rows whose lines an earlier run has written. Return their number.

    Raises:
        ValueError: if a line is not the line of its row.
    """
    number = 0
    for number, line in enumerate(output.lines(), start=1):
        row = next(rows, None)
        if row is None:
            raise ValueError(
                f"{path} has more lines than the input has rows, so that it belongs to another input: name another "
                "output."
            )
        found, _ = parse(line)
        result = found.get(kind.result) if isinstance(found, dict) else None
        if _line(kind, row, result) != line.rstrip("\n"):
            raise ValueError(
                f"{path}, line {number} is not of row {number} of the input, so that it belongs to another input: name "
                "another output."
            )
    return number
