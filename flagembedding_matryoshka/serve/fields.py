"""Types of the fields that bodies have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, WithJsonSchema

FIRST_STAGE_SCORE = "first_stage_score"
"""The field of a document that is an object, with its first-stage score."""


def _as_flag(value: Any) -> Any:
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _of_chat_template(values: dict[str, Any]) -> dict[str, str | None]:
    if others := [name for name in values if name != "instruction"]:
        raise ValueError(f"only an instruction can be given to the template, not {others!s:.200}")
    if not isinstance(values.get("instruction"), str | None):
        raise ValueError(f"the instruction must be a string, got {values['instruction']!r:.80}")
    return values


Flag = Annotated[bool, BeforeValidator(_as_flag)]
"""A boolean, or "true" or "false", which some clients send."""
Normalize = Flag | Literal["calibrated"]
Number = Annotated[float, Field(allow_inf_nan=False)]
Side = Annotated[Literal["left", "right"], BeforeValidator(lambda side: side.lower() if type(side) is str else side)]
Cascade = Annotated[
    dict[int, float],
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[1-9][0-9]*$"},
            "additionalProperties": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        }
    ),
]
OfChatTemplate = Annotated[
    dict[str, Any],
    AfterValidator(_of_chat_template),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {"instruction": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
            "additionalProperties": False,
        }
    ),
]
MOST_FUSION = 1e6
"""The highest weight of a request. At far lower weights the model's scores no longer change the order."""
Weight = Annotated[float, Field(ge=0, le=MOST_FUSION, allow_inf_nan=False)] | Literal["auto"]
FirstStageScores = Annotated[list[Number | None], Field(fail_fast=True)]
Document = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "properties": {FIRST_STAGE_SCORE: {"anyOf": [{"type": "number"}, {"type": "null"}]}},
            "additionalProperties": True,
        }
    ),
]
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Texts = Annotated[list[str], FailFast()]
OneOrMore = Annotated[
    Texts,
    BeforeValidator(lambda texts: [texts] if isinstance(texts, str) else texts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
