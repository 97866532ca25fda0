"""What is made of scores at the very end of a call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from flagembedding_matryoshka.inference.options import CALIBRATED, ScoringOptions
from flagembedding_matryoshka.inference.plan import Plan
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.templates import Template

Normalizer = Callable[[Tensor, int], Tensor]
"""Scores that were read at an exit to what is returned in their place; it never changes their order."""


def normalizer(
    options: ScoringOptions,
    setting: Setting,
    plan: Callable[[], Plan],
    conditions: Mapping[str, Any],
    temperature: float,
    exits: Collection[int] = (),
) -> Normalizer | None:
    """By `normalize`: the sigmoid of score ÷ temperature, the plan's map for each exit at which scores are read, or
    None for none.

    In a cascade each exit has its own map, which was fitted to all candidates: of those that came so far more may be
    relevant than it says.

    Args:
        plan: gives the model's, if it is asked for.
        conditions: of this call, see `scored_with`.
        temperature: see `Template`.
        exits: at which scores may be read, too.

    Raises:
        FileNotFoundError: if there is no plan.
        ValueError: if it has nothing for an exit, or was measured with other words, weights or another dtype.
    """
    if options.normalize == CALIBRATED:
        found = plan()
        found.check_conditions(conditions)
        layers = (*exits, *dict(setting.cascade), *setting.cutoff_layers)
        maps = {layer: found.calibration(setting, layer) for layer in layers}
        return lambda scores, layer: maps[layer](scores)
    return (lambda scores, layer: (scores / temperature).sigmoid()) if options.normalize else None


def scored_with(options: ScoringOptions, quantization: str | None, dtype: str, template: Template) -> dict[str, Any]:
    """What makes scores of the same weights others, beside depth, width and where texts are cut, as JSON can hold it.

    Args:
        dtype: the format that weights are loaded in, such as "float32".
        template: the model's, with its temperature, its head tokens and the instruction of calls that give none.
    """
    return template.to_json() | {
        "query_instruction": options.query_instruction_for_rerank,
        "query_format": options.query_instruction_format,
        "passage_instruction": options.passage_instruction_for_rerank,
        "passage_format": options.passage_instruction_format,
        "instruction": template.instruction if options.instruction is None else options.instruction,
        "prompt": options.prompt,
        "quantization": quantization,
        "dtype": dtype,
    }
