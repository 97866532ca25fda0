"""Training rows: how they are loaded, cached, sampled and mixed, and the instructions in them."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from flagembedding_matryoshka.finetune.sources import Columns, place_of, read_source, source_key
from flagembedding_matryoshka.mining.rows import INSTRUCTIONS, RowKind, row_fault, split_by_label
from flagembedding_matryoshka.private import selected_rows
from flagembedding_matryoshka.text.templates import Template

logger = logging.get_logger(__name__)

TEXTS, NUMBERS = ListOf(Value("string")), ListOf(Value("float64"))
LABELS = {"pos": TEXTS, "neg": TEXTS, "pos_labels": NUMBERS}
COLUMNS: dict[RowKind, dict[str, Any]] = {
    "labels": LABELS,
    "scores": {**LABELS, "pos_scores": NUMBERS, "neg_scores": NUMBERS},
    "passages": {"passages": TEXTS},
}
NO_ROW = "no row"
LAYOUT = 4
"""Version of the cache's layout and of the row checks. Caches of other versions are ignored."""
InstructionCounts = Mapping[str, Mapping[str, int]]
"""{column of `INSTRUCTIONS`: {value: number of rows that have it}}; a row without a value counts under ""."""


def load_rows(
    path: str,
    kind: RowKind,
    cache_dir: str | None,
    skip_bad_lines: bool = False,
    min_negatives: int = 1,
    mapping: Columns | None = None,
) -> Dataset:
    """Load the rows of a file, memory-mapped, with the columns of a kind. A file is parsed once and then cached.

    Args:
        path: the file, or a data set, see `source_files`.
        kind: the kind of row that training needs.
        cache_dir: cache directory of `datasets`; None is its default.
        skip_bad_lines: leave out bad lines, and warn of their number and the first one, instead of raising.
        min_negatives: as in `row_fault`.
        mapping: columns of the file that are read under another name; None is none.

    Raises:
        OSError: if nothing can be written to the cache.
        ValueError: on the first bad line; names file, line and fault.
    """
    columns = {"query": Value("string"), **COLUMNS[kind], **dict.fromkeys(INSTRUCTIONS, Value("string"))}
    features = Features({**columns, "fault": Value("string")})
    mapping = mapping or {}
    key = [LAYOUT, kind, min_negatives, sorted(mapping.items()), *source_key(path)]
    try:
        rows = Dataset.from_generator(
            _arrow_rows,
            features=features,
            cache_dir=cache_dir,
            gen_kwargs={"path": path, "kind": kind, "min_negatives": min_negatives, "mapping": mapping},
            fingerprint=hashlib.sha256(json.dumps(key).encode()).hexdigest(),
        )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None
    except OSError as error:
        raise OSError(
            f"{path} is parsed once, into {cache_dir or HF_DATASETS_CACHE}, where nothing can be written ({error}). "
            "Name a directory that can be written by --cache_path or the variable HF_DATASETS_CACHE."
        ) from error
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
    paths: Sequence[str],
    kind: RowKind,
    cache_dir: str | None,
    skip_bad_lines: bool = False,
    min_negatives: int = 1,
    mapping: Columns | None = None,
) -> list[Dataset]:
    """`load_rows` of several files.

    Raises:
        ValueError: as `load_rows`, and if no file has a row.
    """
    files = [load_rows(path, kind, cache_dir, skip_bad_lines, min_negatives, mapping) for path in paths]
    if not any(map(len, files)):
        raise ValueError(f"there is no row in {', '.join(paths)}")
    return files


def sample_rows(rows: Dataset, path: str, limit: int, seed: int) -> Dataset:
    """Draw at most `limit` rows of a file. The draw depends on `seed` and the file's name without its directory."""
    if len(rows) <= limit:
        return rows
    return rows.select(random.Random(f"{seed}-{Path(path).name}").sample(range(len(rows)), limit))


def mix_rows(files: Sequence[Dataset], weights: Sequence[float], seed: int) -> list[Dataset]:
    """Draw rows of each file so that their numbers are in the proportion of the weights.

    The sum of all numbers stays. A row is drawn again only after all rows of its file have been drawn.

    Raises:
        ValueError: if a file has no row.
    """
    total, mixed = sum(map(len, files)), []
    for place, (rows, weight) in enumerate(zip(files, weights, strict=True)):
        if not len(rows):
            raise ValueError(f"the file at place {place} of the training data (counted from 0) has a weight and no row")
        count = max(1, round(total * weight / sum(weights)))
        whole, rest = divmod(count, len(rows))
        drawn = random.Random(f"{seed}-{place}").sample(range(len(rows)), rest)
        mixed.append(rows.select([*range(len(rows))] * whole + drawn))
    return mixed


def _arrow_rows(path: str, kind: RowKind, min_negatives: int, mapping: Columns) -> Iterator[dict[str, Any]]:
    """Yield every row, with its fault under `fault`.

    `datasets` cannot cache a file without rows, so such a file yields one row with the fault `NO_ROW`.
    """
    names = ("query", *COLUMNS[kind], *INSTRUCTIONS)
    number = 0
    check = partial(row_fault, kind=kind, min_negatives=min_negatives)
    for number, row, fault in read_source(path, mapping, check):
        if row is None:
            yield {**dict.fromkeys(names), "fault": f"{place_of(path, number)}: {fault}"}
            continue
        if kind == "passages":
            row.setdefault("passages", [*row.get("pos", ()), *row.get("neg", ())])
        else:
            row = split_by_label(row)
            if row.get("pos_labels") is None:
                row["pos_labels"] = [1.0] * len(row["pos"])
        if kind == "scores":
            row["neg_scores"] = row.get("neg_scores") or []  # missing only where `neg` is empty
        yield {**{name: row.get(name) for name in names}, "fault": None}
    if number == 0:
        yield {**dict.fromkeys(names), "fault": NO_ROW}


def count_instructions(files: Iterable[Dataset]) -> InstructionCounts:
    """Count the rows of each value in the columns of `INSTRUCTIONS`. No other column is read."""
    found: dict[str, Counter[str]] = {column: Counter() for column in INSTRUCTIONS}
    for rows in files:
        selected = selected_rows(rows)
        for column, counts in found.items():
            values = rows.data.column(column)
            for item in pc.value_counts(values if selected is None else values.take(selected)).to_pylist():
                counts[item["values"] or ""] += item["counts"]
    return found


def refuse_instructions(template: Template, counts: InstructionCounts) -> None:
    """Raise ValueError if the template would ignore the instruction or the query_prompt of a row."""
    total = sum(counts["instruction"].values())
    instructed = total - counts["instruction"].get("", 0)
    if instructed and template.instructed is None:
        raise ValueError(
            f"{instructed} of {total} rows have an instruction, but the template has no place for one. prompt, "
            "query_prompt and passage_prompt replace texts of any template."
        )
    prompted = total - counts["query_prompt"].get("", 0)
    replaces_prompt = template.instructed is not None and "query_instruction" in template.instructed
    if prompted and replaces_prompt and (instructed or template.instruction):
        said = (
            f"{instructed} of them an instruction" if instructed else f"the template has {template.instruction!r:.80}"
        )
        raise ValueError(
            f"{prompted} of {total} rows have a query_prompt and {said}: with this template an instruction "
            "replaces a query_prompt. Leave query_prompt out."
        )


def template_of_rows(template: Template, counts: InstructionCounts, warns: bool = True) -> Template:
    """Return the template to save, so that scoring uses the instructions of training.

    A value that all rows have replaces the template's value. Where rows differ, the template keeps its own value.

    Args:
        template: template of the checkpoint and the arguments.
        counts: counts of the training rows.
        warns: warn of columns in which rows differ.

    Raises:
        ValueError: as `refuse_instructions`.
    """
    refuse_instructions(template, counts)
    total = sum(counts["instruction"].values())
    agreed: dict[str, Any] = {}
    differing = []
    for column, field in INSTRUCTIONS.items():
        values = [value for value in counts[column] if value]
        if len(values) == len(counts[column]) == 1:
            agreed[field] = values[0]
        elif values:
            own = total - counts[column].get("", 0)
            kept = template.default_instruction if field == "instruction" else getattr(template, field)
            count = len(values)
            differing.append(f"{own} of {total} rows have {count} different values of {column} (saved: {kept!r:.80})")
    if differing and warns:
        logger.warning(
            "%s. Each row is trained with its own. The saved template keeps its own value, and scoring uses it.",
            "; ".join(differing),
        )
    return replace(template, **agreed)
