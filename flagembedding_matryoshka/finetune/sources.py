"""Sources of training rows: files in JSON or Parquet, and data sets by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetBuilder, load_dataset_builder

from flagembedding_matryoshka.mining.rows import INSTRUCTIONS
from flagembedding_matryoshka.text.lines import Row, format_of, read_rows

PARQUET = ".parquet"
SUFFIXES = (".json", ".jsonl", PARQUET)
"""Formats of files; .json and .jsonl may be compressed by gzip, with .gz after them."""
DATASET = "dataset:"
"""Prefix of a data set's name."""
LIST_COLUMNS = ("pos", "neg", "passages", "labels", "scores", "pos_scores", "neg_scores", "pos_labels")
TEXT_COLUMNS = ("query", *INSTRUCTIONS)
Columns = Mapping[str, Sequence[str]]
"""Column of a row to the columns of a source that it is read from. Several are joined into one list."""
Check = Callable[[dict[str, Any]], str | None]


@dataclass(frozen=True)
class NamedDataset:
    """A data set of the hub, or a local directory that `datasets.load_dataset` reads.

    Attributes:
        name: its name or path.
        config: its configuration; None is the default.
        split: its split.
    """

    name: str
    config: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, source: str) -> NamedDataset:
        """Parse `dataset:NAME`, `dataset:NAME:SPLIT` or `dataset:NAME:CONFIG:SPLIT`.

        Raises:
            ValueError: if the text has another form.
        """
        parts = source.removeprefix(DATASET).split(":")
        if not all(parts) or len(parts) > 3:
            raise ValueError(f"{source} must be dataset:NAME, dataset:NAME:SPLIT or dataset:NAME:CONFIG:SPLIT.")
        name, *rest = parts
        return cls(name, *rest) if len(rest) == 2 else cls(name, None, *rest)

    def builder(self) -> DatasetBuilder:
        """Return the builder of `datasets`. No code of the data set is run."""
        return load_dataset_builder(self.name, self.config)


def source_files(paths: Sequence[str]) -> list[str]:
    """Return the files and data sets of `paths`, which may also be directories.

    Files of a directory are in the order of their names, without hidden files.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if a file has another format, a directory has no file, or the name of a data set has another form.
    """
    files: list[str] = []
    formats = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    for source in paths:
        if source.startswith(DATASET):
            NamedDataset.parse(source)
            files.append(source)
            continue
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(
                f"there is no training data at {path}. The name of a data set begins with {DATASET}, such as "
                f"{DATASET}OWNER/NAME."
            )
        if path.is_dir():
            visible = (file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
            found = sorted(str(file) for file in visible if format_of(file) in SUFFIXES)
            if not found:
                raise ValueError(f"the directory {path} has no {formats} file.")
            files.extend(found)
        elif format_of(path) in SUFFIXES:
            files.append(str(path))
        else:
            raise ValueError(
                f"the name of {path} does not end with {formats}: training data is JSON Lines, compressed or not, or "
                "Parquet."
            )
    return files


def parse_columns(pairs: Sequence[str]) -> dict[str, list[str]]:
    """Parse `NAME=THEIRS` of each column of a source that is read under another name.

    Raises:
        ValueError: if a pair has another form, a row has no such column, or a text is read from several columns.

    >>> parse_columns(["query=question", "neg=negative_1", "neg=negative_2"])
    {'query': ['question'], 'neg': ['negative_1', 'negative_2']}
    """
    columns: dict[str, list[str]] = {}
    for pair in pairs:
        name, equals, theirs = pair.partition("=")
        if not (equals and theirs) or name not in (*TEXT_COLUMNS, *LIST_COLUMNS):
            known = ", ".join((*TEXT_COLUMNS, *LIST_COLUMNS))
            raise ValueError(f"columns: {pair!r} must be NAME=THEIRS, where NAME is one of {known}.")
        columns.setdefault(name, []).append(theirs)
    if several := [name for name in TEXT_COLUMNS if len(columns.get(name, ())) > 1]:
        raise ValueError(f"columns: {several[0]} is one text, but is read from {', '.join(columns[several[0]])}.")
    return columns


def map_columns(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """Return a row under our names, without values that are None. A single value of a list column becomes a list.

    A source without the columns of a name keeps its own column of this name.
    """
    taken = {theirs for sources in columns.values() for theirs in sources}
    mapped = {name: value for name, value in row.items() if name not in taken}
    for name, sources in columns.items():
        values = [row[theirs] for theirs in sources if theirs in row]
        if not values:
            continue
        if name in TEXT_COLUMNS:
            mapped[name] = values[0]
        else:
            lists = (value if isinstance(value, list) else [value] for value in values)
            mapped[name] = [item for items in lists for item in items]
    return {name: value for name, value in mapped.items() if value is not None}


def read_source(source: str, columns: Columns, check: Check) -> Iterator[Row]:
    """Yield the rows of a file or data set, and the faults of those that have one.

    A data set of the hub is streamed: its files are not stored.

    Args:
        source: an item of `source_files`.
        columns: the columns that are read under another name.
        check: returns the fault of a row under our names; None if there is none.

    Raises:
        ValueError: if a file is damaged, or a data set has no such split.
    """
    for number, raw, fault in _read(source):
        if raw is None:
            yield Row(number, None, fault)
            continue
        row = map_columns(raw, columns)
        fault = check(row)
        yield Row(number, None if fault else row, fault)


def _read(source: str) -> Iterator[Row]:
    if not source.startswith(DATASET) and format_of(Path(source)) != PARQUET:
        yield from read_rows(Path(source), lambda row: None)
        return
    rows = _stream(NamedDataset.parse(source)) if source.startswith(DATASET) else _read_parquet(source)
    for number, row in enumerate(rows, start=1):
        yield Row(number, row, None)


def _stream(dataset: NamedDataset) -> Iterator[dict[str, Any]]:
    yield from dataset.builder().as_streaming_dataset(split=dataset.split)


def _read_parquet(path: str) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file, or is damaged: {error}") from error


def place_of(source: str, number: int) -> str:
    """Return the place of a row in a source, for an error; `number` counts from 1."""
    is_text = not source.startswith(DATASET) and format_of(Path(source)) != PARQUET
    return f"{'line' if is_text else 'row'} {number}"


def source_key(source: str) -> list[Any]:
    """Return JSON values that change when the source changes."""
    if not source.startswith(DATASET):
        stat = os.stat(source)
        return [os.path.realpath(source), stat.st_size, stat.st_mtime_ns]
    dataset = NamedDataset.parse(source)
    builder = dataset.builder()
    files = (builder.config.data_files or {}).get(dataset.split, [])
    return [source, builder.hash, list(files), [list(data) for data in getattr(files, "origin_metadata", ())]]
