"""Commands that make one training row for each query, resume after they were stopped, and work on shards."""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from flagembedding_matryoshka.mining.rows import describe_counts, write_rows
from flagembedding_matryoshka.text.output import FileOutput

logger = logging.getLogger(__name__)

QUERIES_AT_ONCE = 1024
"""Number of queries whose rows are stored at a time."""


class Outcome(NamedTuple):
    """What became of a query.

    Attributes:
        row: its training row; None if there is none.
        left_out: number of queries and passages that were left out, by their kind.
    """

    row: dict[str, Any] | None
    left_out: Counter[str]


@dataclass(frozen=True)
class Shard:
    """A contiguous part of the rows or queries of a file, so that the outputs of all shards concatenate to the whole.

    Attributes:
        number: the number of the part, from 1.
        count: the number of parts.
    """

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def places(self, total: int) -> range:
        """Return the indices of the part among `total`."""
        return range(total * (self.number - 1) // self.count, total * self.number // self.count)


def parse_shard(text: str) -> Shard:
    """Parse "2/8". Raises argparse.ArgumentTypeError if it is no such text."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with 1 <= I <= N, such as 2/8")
    return Shard(int(number), int(count))


def add_shard(parser: argparse.ArgumentParser, items: str) -> None:
    """Add `--shard`.

    Args:
        parser: the parser of the command.
        items: what is split, for the help text.
    """
    parser.add_argument(
        "--shard",
        type=parse_shard,
        default=Shard(),
        metavar="I/N",
        help=f"only part I of N, from 1, of the {items}; the outputs of all parts concatenate to the whole",
    )


def partial_path(output: Path) -> Path:
    """Return the path of the lines that a command has stored, which exists until its output is complete."""
    return output.with_name(f"{output.name}.partial")


def write_outcomes(
    output: Path, conditions: Mapping[str, Any], total: int, outcomes: Callable[[int], Iterator[Outcome]]
) -> int:
    """Write the rows of all queries and return their number.

    Outcomes are appended to `partial_path(output)`. If the file exists, the queries in it are skipped.

    Args:
        output: the training file, which appears when it is complete.
        conditions: JSON values of all conditions of the rows.
        total: number of queries.
        outcomes: takes a number of queries to skip, and yields the outcome of each later query.

    Raises:
        ValueError: if the partial file has other conditions, or no query has a row.
    """
    stored = FileOutput(partial_path(output), conditions)
    done = sum(1 for _ in stored.lines())
    if done:
        logger.info("%s has %d of %d queries", stored.path, done, total)
    if done < total:
        try:
            found = outcomes(done)
            while chunk := list(islice(found, QUERIES_AT_ONCE)):
                stored.append(json.dumps(outcome, ensure_ascii=False) for outcome in chunk)
        except BaseException:
            if not stored.end:
                stored.remove()
            raise
    left_out, count = Counter[str](), 0
    for row, counts in map(json.loads, stored.lines()):
        left_out.update(counts)
        count += row is not None
    if not count:
        stored.remove()
        raise ValueError(f"none of {total} queries has a training row. Left out are {describe_counts(left_out)}.")
    if left_out:
        logger.warning("%d queries. Left out are %s", total, describe_counts(left_out))
    write_rows(output, (row for row, _ in map(json.loads, stored.lines()) if row is not None))
    stored.remove()
    return count
