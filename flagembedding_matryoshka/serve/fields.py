"""Types of the fields that bodies have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, WithJsonSchema


def _as_flag(value: Any) -> Any:
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


Flag = Annotated[bool, BeforeValidator(_as_flag)]
"""A boolean, or "true" or "false", which some clients send."""
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
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Texts = Annotated[list[str], FailFast()]
OneOrMore = Annotated[
    Texts,
    BeforeValidator(lambda texts: [texts] if isinstance(texts, str) else texts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
