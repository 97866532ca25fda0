"""Training rows: their columns, their faults, and how files of them are written."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from flagembedding_matryoshka.files import replacing

RowKind = Literal["labels", "scores", "passages"]
"""Kind of a training row: "labels" has positives and negatives, "scores" has teacher scores too, "passages" has
passages without labels."""
INSTRUCTIONS = {
    "prompt": "prompt",
    "query_prompt": "query_instruction",
    "passage_prompt": "passage_instruction",
    "instruction": "instruction",
}
"""Optional columns of a row to the fields of its template. The first three are FlagEmbedding's and replace the field's
text. `instruction` is inserted at the template's place for an instruction."""


_HOW_TO_TEACH = "`flagembedding-matryoshka teach` adds scores, and --train_method normal trains without them"


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSON Lines, all of them or no file, and return their number. A missing directory is created.

    Raises:
        IsADirectoryError: if `path` is a directory.
    """
    count = 0
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    return count


def row_fault(row: dict[str, Any], kind: RowKind, min_negatives: int = 1) -> str | None:
    """Return the fault of a row, None for a valid row.

    Args:
        row: a row of a training file.
        kind: the kind that training needs.
        min_negatives: least length of `neg`, 0 or 1. 0 is for groups whose negatives are all drawn from other rows: an
            empty `neg` needs no `neg_scores`, and `passages` may have a single passage.
    """
    if not isinstance(row.get("query"), str):
        return f"query must be a string, got {row.get('query')!r:.200}"
    for name in INSTRUCTIONS:
        if not isinstance(row.get(name), str | None):
            return f"{name} must be a string where it is given, got {row[name]!r:.200}"
    if kind == "passages" and "passages" in row:
        return _texts_fault(row, "passages", 1 + min_negatives)
    if kind != "passages" and row.get("labels") is not None:
        return _graded_fault(row, kind, min_negatives)
    for name, least in (("pos", 1), ("neg", min_negatives)):
        if fault := _texts_fault(row, name, least):
            return (
                fault
                if kind != "passages"
                else f"{fault}; or passages, a list of at least {('one', 'two')[min_negatives]}"
            )
        if kind != "passages" and (fault := _scores_fault(row, name, kind)):
            return fault
    labels = row.get("pos_labels")
    if kind != "passages" and labels is not None and not (_are_numbers(labels, len(row["pos"])) and min(labels) > 0):
        return (
            f"pos_labels must be a list of {len(row['pos'])} numbers above 0, one for each of pos, got {labels!r:.200}"
        )
    return None


def split_by_label(row: dict[str, Any]) -> dict[str, Any]:
    """Return a valid row of `passages` and `labels` as one of `pos`, `pos_labels` and `neg`. Other rows stay.

    Labels above 0 are the grades of positives. Passages with other labels are negatives. `scores`, the teacher's,
    become `pos_scores` and `neg_scores`.
    """
    labels = row.get("labels")
    if labels is None:
        return row
    places = {"pos": [i for i, label in enumerate(labels) if label > 0]}
    places["neg"] = [i for i, label in enumerate(labels) if label <= 0]
    split = {name: value for name, value in row.items() if name not in ("passages", "labels", "scores")}
    for name, indices in places.items():
        split[name] = [row["passages"][i] for i in indices]
        if row.get("scores") is not None:
            split[f"{name}_scores"] = [row["scores"][i] for i in indices]
    return split | {"pos_labels": [labels[i] for i in places["pos"]]}


def _graded_fault(row: dict[str, Any], kind: RowKind, min_negatives: int) -> str | None:
    if both := [name for name in ("pos", "neg") if name in row]:
        return f"a row with labels has passages, and no {' and '.join(both)}"
    if fault := _texts_fault(row, "passages", 1 + min_negatives):
        return fault
    labels, scores, wanted = row["labels"], row.get("scores"), len(row["passages"])
    if not _are_numbers(labels, wanted):
        return f"labels must be a list of {wanted} numbers, one for each of passages, got {labels!r:.200}"
    if max(labels) <= 0 or (min_negatives and min(labels) > 0):
        return f"labels must have a value above 0, and one of 0 or below for a negative, got {labels!r:.200}"
    if scores is None and kind == "scores":
        return f"scores is missing. {_HOW_TO_TEACH}"
    if scores is not None and not _are_numbers(scores, wanted):
        return f"scores must be a list of {wanted} numbers, one for each of passages, got {scores!r:.200}"
    return None


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(_is_finite, values))


def collapsed(text: str) -> str:
    """Return a text with single spaces for its white space. Texts that are then equal count as the same."""
    return " ".join(text.split())


def keep_passages(row: dict[str, Any], side: str, kept: Sequence[int]) -> dict[str, Any]:
    """Return a row with some of its passages.

    Args:
        row: a training row.
        side: "pos" or "neg". Lists of the same length in fields such as `neg_scores` and `neg_id` are cut, too.
        kept: indices of the passages to keep.
    """
    count = len(row[side])
    lists = (
        name
        for name, values in row.items()
        if (name == side or name.startswith(f"{side}_")) and isinstance(values, list) and len(values) == count
    )
    return row | {name: [row[name][index] for index in kept] for name in lists}


def usable_passages(
    query: str, passages: Sequence[str], positives: Sequence[str] = ()
) -> tuple[list[int], Counter[str]]:
    """Return the indices of the passages that something can be learned from, and the number of the others by kind.

    The others are empty passages, the query itself, and negatives that are also positives.

    Args:
        query: the query.
        passages: its positives or its negatives.
        positives: for negatives, its positives.
    """
    usable: list[int] = []
    left_out = Counter[str]()
    asked, relevant = collapsed(query), set(map(collapsed, positives))
    for index, text in enumerate(map(collapsed, passages)):
        if not text:
            left_out["empty passages"] += 1
        elif text == asked:
            left_out["passages that are the query"] += 1
        elif text in relevant:
            left_out["negatives that are also positives"] += 1
        else:
            usable.append(index)
    return usable, left_out


def clean_row(row: dict[str, Any]) -> tuple[dict[str, Any] | None, Counter[str]]:
    """Return a row with its usable passages, and the number of what is left out by kind.

    The row is None if its query is empty, or if it had positives or negatives and loses all of them.

    Args:
        row: a row with `query`, `pos` and `neg`.
    """
    if not row["query"].strip():
        return None, Counter({"empty queries": 1})
    cleaned, left_out = row, Counter[str]()
    for side, positives in (("pos", ()), ("neg", row["pos"])):
        usable, counts = usable_passages(row["query"], row[side], positives)
        left_out += counts
        if row[side] and not usable:
            return None, left_out + Counter({f"rows that lose all of {side}": 1})
        cleaned = keep_passages(cleaned, side, usable) if counts else cleaned
    return cleaned, left_out


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return counts in words, such as "empty passages: 2, empty queries: 1"."""
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


def _texts_fault(row: dict[str, Any], name: str, least: int) -> str | None:
    texts = row.get(name)
    if isinstance(texts, list) and len(texts) >= least and all(isinstance(text, str) for text in texts):
        return None
    wanted = ("strings", "at least one string", "at least two strings")[least]
    return f"{name} must be a list of {wanted}, got {texts!r:.200}"


def _scores_fault(row: dict[str, Any], name: str, kind: RowKind) -> str | None:
    scores, wanted = row.get(f"{name}_scores"), len(row[name])
    if scores is None:
        if kind == "labels" or not wanted:
            return None
        return f"{name}_scores is missing. {_HOW_TO_TEACH}"
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
