"""Words that training rows bring themselves, and the template that is saved."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from flagembedding_matryoshka.finetune.rows import INSTRUCTIONS
from flagembedding_matryoshka.text.templates import Template

logger = logging.getLogger(__name__)

Counts = Mapping[str, Mapping[str, int]]
"""{column of `INSTRUCTIONS`: {value: how many rows have it}}; "" is none."""


def count_words(files: Iterable[Dataset]) -> Counts:
    """Count the rows of each value, reading the columns of `INSTRUCTIONS` alone, in place."""
    found: dict[str, Counter[str]] = {column: Counter() for column in INSTRUCTIONS}
    for rows in files:
        indices = rows._indices  # of rows that were selected: reading these through `Dataset` takes 100 times as long
        for column, counts in found.items():
            values = rows.data.column(column)
            for item in pc.value_counts(values if indices is None else values.take(indices.column(0))).to_pylist():
                counts[item["values"] or ""] += item["counts"]
    return found


def refuse_misplaced(template: Template, counts: Counts) -> None:
    """Raise ValueError if rows have an instruction and the template has no place for one, or an instruction takes the
    place of a query_prompt."""
    total = sum(counts["instruction"].values())
    instructed = total - counts["instruction"].get("", 0)
    if instructed and template.instructed is None:
        raise ValueError(
            f"{instructed} of {total} rows have an instruction, but the template has no place for one. prompt, "
            "query_prompt and passage_prompt replace words of any template."
        )
    prompted = total - counts["query_prompt"].get("", 0)
    takes_its_place = template.instructed is not None and "query_instruction" in template.instructed
    if prompted and takes_its_place and (instructed or template.instruction):
        said = f"{instructed} of them an instruction" if instructed else f"the template {template.instruction!r:.80}"
        raise ValueError(
            f"{prompted} of {total} rows have a query_prompt and {said}: with this template an instruction takes the "
            "place of a query_prompt. Give one of them, instruction."
        )


def template_of_rows(template: Template, counts: Counts, warns: bool = True) -> Template:
    """The template to save, with which scoring uses the words of training: a value that all rows have goes into it.

    Args:
        template: that of the checkpoint and the arguments.
        warns: whether to warn once of columns in which rows differ: no template has the words of all of them.

    Raises:
        ValueError: as `refuse_misplaced`.
    """
    refuse_misplaced(template, counts)
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
