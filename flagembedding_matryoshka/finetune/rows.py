"""Files of training rows: paths, contents and faults of lines."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from flagembedding_matryoshka.finetune.losses import TRAIN_METHODS, Reads
from flagembedding_matryoshka.text.lines import read_rows

logger = logging.get_logger(__name__)

SUFFIXES = (".json", ".jsonl")
INSTRUCTIONS = {
    "prompt": "prompt",
    "query_prompt": "query_instruction",
    "passage_prompt": "passage_instruction",
    "instruction": "instruction",
}
"""What a row may bring of a template: its column to the template's field. The first three are FlagEmbedding's and
replace words; `instruction` goes into the place that the template has for one."""
TEXTS, NUMBERS = ListOf(Value("string")), ListOf(Value("float64"))
LABELS = {"pos": TEXTS, "neg": TEXTS}
COLUMNS: dict[Reads, dict[str, Any]] = {
    "labels": LABELS,
    "scores": {**LABELS, "pos_scores": NUMBERS, "neg_scores": NUMBERS},
    "passages": {"passages": TEXTS},
}
NO_ROW = "no row"
LAYOUT = 3
"""Version of the cache's layout and of the row checks. Caches of other versions are not read."""


def training_files(paths: Sequence[str]) -> list[str]:
    """Return the training files of `paths`, files or directories; those of a directory by name, without hidden ones.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if a file's name does not end with .json or .jsonl, or a directory has no such file.
    """
    files: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"there is no training data at {path}")
        if path.is_dir():
            visible = (file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
            found = sorted(str(file) for file in visible if file.suffix in SUFFIXES)
            if not found:
                raise ValueError(f"{path} holds no {' or '.join(SUFFIXES)} file.")
            files.extend(found)
        elif path.suffix in SUFFIXES:
            files.append(str(path))
        else:
            raise ValueError(f"{path} is not called {' or '.join(SUFFIXES)}: training data is JSON Lines.")
    return files


def load_rows(
    path: str, reads: Reads, cache_dir: str | None, skip_bad_lines: bool = False, min_negatives: int = 1
) -> Dataset:
    """Load the rows of a file, memory-mapped, with the columns that are read. A file is parsed once and then cached.

    Args:
        cache_dir: of `datasets`; None is its own.
        skip_bad_lines: leave out bad lines, and warn of their number and the first one, instead of raising.
        min_negatives: as in `row_fault`.

    Raises:
        ValueError: on the first bad line; names file, line and fault.
    """
    columns = {"query": Value("string"), **COLUMNS[reads], **dict.fromkeys(INSTRUCTIONS, Value("string"))}
    features = Features({**columns, "fault": Value("string")})
    stat = os.stat(path)
    key = [LAYOUT, reads, min_negatives, os.path.realpath(path), stat.st_size, stat.st_mtime_ns]
    try:
        rows = Dataset.from_generator(
            _arrow_rows,
            features=features,
            cache_dir=cache_dir,
            gen_kwargs={"path": path, "reads": reads, "min_negatives": min_negatives},
            fingerprint=hashlib.sha256(json.dumps(key).encode()).hexdigest(),
        )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None
    faults = rows.data.column("fault")
    if faults[0].as_py() == NO_ROW:
        return rows.select([]).select_columns(list(columns))
    bad = len(rows) - faults.null_count
    if bad:
        first = pc.drop_null(faults)[0].as_py()
        if not skip_bad_lines:
            more = "" if bad == 1 else f" ({bad} of {len(rows)} lines are wrong)"
            raise ValueError(f"{path}, {first}{more}")
        logger.warning_once("%s: %d bad lines are left out, %d are kept. %s", path, bad, faults.null_count, first)
        rows = rows.select(pc.indices_nonzero(pc.is_null(faults)).to_pylist())
    return rows.select_columns(list(columns))


def load_files(
    paths: Sequence[str], reads: Reads, cache_dir: str | None, skip_bad_lines: bool = False, min_negatives: int = 1
) -> list[Dataset]:
    """`load_rows` of several files.

    Raises:
        ValueError: as `load_rows`, and if no file has a row.
    """
    files = [load_rows(path, reads, cache_dir, skip_bad_lines, min_negatives) for path in paths]
    if not any(map(len, files)):
        raise ValueError(f"there is no row in {', '.join(paths)}")
    return files


def sampled(rows: Dataset, path: str, limit: int, seed: int) -> Dataset:
    """Draw at most `limit` rows of a file, by `seed` and the file's name without its directory."""
    if len(rows) <= limit:
        return rows
    return rows.select(random.Random(f"{seed}-{Path(path).name}").sample(range(len(rows)), limit))


def _arrow_rows(path: str, reads: Reads, min_negatives: int) -> Iterator[dict[str, Any]]:
    """Yield every row, with its fault under `fault`; `NO_ROW` for a file without rows, which cannot be cached."""
    names = ("query", *COLUMNS[reads], *INSTRUCTIONS)
    number = 0
    check = partial(row_fault, reads=reads, min_negatives=min_negatives)
    for number, row, fault in read_rows(Path(path), check):
        if row is None:
            yield {**dict.fromkeys(names), "fault": f"line {number}: {fault}"}
            continue
        if reads == "passages":
            row.setdefault("passages", [*row.get("pos", ()), *row.get("neg", ())])
        elif reads == "scores":
            row["neg_scores"] = row.get("neg_scores") or []  # missing only where `neg` is empty
        yield {**{name: row.get(name) for name in names}, "fault": None}
    if number == 0:
        yield {**dict.fromkeys(names), "fault": NO_ROW}


def row_fault(row: dict[str, Any], reads: Reads, min_negatives: int = 1) -> str | None:
    """Return the fault of a row, None for a valid row.

    Args:
        row: a row of a training file.
        reads: the columns that training reads.
        min_negatives: least length of `neg`, 0 or 1. 0 is for groups whose negatives are all drawn from other rows: an
            empty `neg` needs no `neg_scores`, and `passages` may have a single passage.
    """
    if not isinstance(row.get("query"), str):
        return f"query must be a string, got {row.get('query')!r:.200}"
    for name in INSTRUCTIONS:
        if not isinstance(row.get(name), str | None):
            return f"{name} must be a string where it is given, got {row[name]!r:.200}"
    if reads == "passages" and "passages" in row:
        return _texts_fault(row, "passages", 1 + min_negatives)
    for name, least in (("pos", 1), ("neg", min_negatives)):
        if fault := _texts_fault(row, name, least):
            return (
                fault
                if reads != "passages"
                else f"{fault}; or passages, a list of at least {('one', 'two')[min_negatives]}"
            )
        if reads != "passages" and (fault := _scores_fault(row, name, reads)):
            return fault
    return None


def _texts_fault(row: dict[str, Any], name: str, least: int) -> str | None:
    texts = row.get(name)
    if isinstance(texts, list) and len(texts) >= least and all(isinstance(text, str) for text in texts):
        return None
    wanted = ("strings", "at least one string", "at least two strings")[least]
    return f"{name} must be a list of {wanted}, got {texts!r:.200}"


def _scores_fault(row: dict[str, Any], name: str, reads: Reads) -> str | None:
    scores, wanted = row.get(f"{name}_scores"), len(row[name])
    if scores is None:
        if reads == "labels" or not wanted:
            return None
        free = [method for method, parts in TRAIN_METHODS.items() if parts.reads == "labels"]
        return f"{name}_scores is missing. Methods that need no teacher scores: {', '.join(free)}"
    if not isinstance(scores, list) or len(scores) != wanted:
        return f"{name}_scores must be a list of {wanted} numbers, one for each of {name}, got {scores!r:.200}"
    if not all(map(_is_finite, scores)):
        return f"{name}_scores must be numbers, got {scores!r:.200}"
    return None


def _is_finite(score: Any) -> bool:
    try:
        return isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    except OverflowError:
        return False
