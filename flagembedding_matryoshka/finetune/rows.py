"""Files of training rows: which there are, and what is wrong with their lines."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from datasets.config import HF_DATASETS_CACHE

from flagembedding_matryoshka.finetune.losses import TRAIN_METHODS

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl")
INSTRUCTIONS = {"prompt": "prompt", "query_prompt": "query_instruction", "passage_prompt": "passage_instruction"}
"""What a row may bring of a template: its column to the template's name."""


def training_files(paths: Sequence[str]) -> list[str]:
    """The JSON Lines files that `paths`, files or directories, stand for, those of a directory in order of name.

    Raises:
        FileNotFoundError: if a path is not there.
        ValueError: if a file is not called .json or .jsonl, or a directory holds no such file.
    """
    files: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"there is no training data at {path}")
        if path.is_dir():
            found = sorted(str(file) for file in path.iterdir() if file.suffix in SUFFIXES)
            if not found:
                raise ValueError(f"{path} holds no {' or '.join(SUFFIXES)} file.")
            files.extend(found)
        elif path.suffix in SUFFIXES:
            files.append(str(path))
        else:
            raise ValueError(f"{path} is not called {' or '.join(SUFFIXES)}: training data is JSON Lines.")
    return files


def check_training_file(path: str, needs_scores: bool) -> int:
    """Read every line of a file and return how many rows it has.

    Args:
        needs_scores: whether rows must have `pos_scores` and `neg_scores`.

    Raises:
        ValueError: naming file, line and what is wrong with it.
    """
    return _count_rows(path, needs_scores, os.stat(path).st_mtime_ns)


@cache
def _count_rows(path: str, needs_scores: bool, modified: int) -> int:
    rows = 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            fault = _fault(line, needs_scores)
            if fault is not None:
                raise ValueError(f"{path}, line {number}: {fault}")
            rows += 1
    return rows


def good_lines(path: str, needs_scores: bool, cache_dir: str | None) -> str:
    """`path`, or where lines of it are bad, a copy without them in the cache of `datasets`.

    How many lines were left out, and the first of them, is logged as a warning.
    """
    digest, faults, rows = hashlib.sha256(), [], 0
    directory = Path(cache_dir or HF_DATASETS_CACHE) / "good_lines"
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{os.getpid()}.partial"
    try:
        with open(path, encoding="utf-8") as file, partial.open("w", encoding="utf-8") as copy:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                fault = _fault(line, needs_scores)
                if fault is not None:
                    faults.append(f"line {number}: {fault}")
                    continue
                digest.update(line.encode())
                copy.write(line)
                rows += 1
        if not faults:
            return path
        logger.warning("%s: %d bad lines are left out, %d are kept. %s", path, len(faults), rows, faults[0])
        target = directory / f"{digest.hexdigest()}.jsonl"
        if not target.exists():
            partial.replace(target)
        return str(target)
    finally:
        partial.unlink(missing_ok=True)


def _fault(line: str, needs_scores: bool) -> str | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON ({error})"
    if not isinstance(row, dict):
        return f"a row is an object with query, pos and neg, got {line.strip()[:80]}"
    if not isinstance(row.get("query"), str):
        return f"query must be a string, got {row.get('query')!r}"
    for name in INSTRUCTIONS:
        if not isinstance(row.get(name), str | None):
            return f"{name} must be a string where it is given, got {row[name]!r}"
    for name in ("pos", "neg"):
        texts = row.get(name)
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            return f"{name} must be a list of at least one string, got {texts!r}"[:200]
        scores = row.get(f"{name}_scores")
        if scores is None and not needs_scores:
            continue
        if scores is None:
            free = [method for method, parts in TRAIN_METHODS.items() if parts.data_scores == "none"]
            return f"{name}_scores is missing. Methods that need no teacher scores: {', '.join(free)}"
        if not isinstance(scores, list) or len(scores) != len(texts):
            return f"{name}_scores must be a list of {len(texts)} numbers, one for each of {name}, got {scores!r}"[:200]
        if not all(isinstance(score, (int, float)) and math.isfinite(score) for score in scores):
            return f"{name}_scores must be numbers, got {scores!r}"[:200]
    return None
