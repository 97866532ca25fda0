"""What the OpenAPI document says of a route beyond its path."""

from __future__ import annotations

import re
from typing import Any

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker

FOLDERS = re.compile(r"(?<=: ).*[/\\]|[^\s'\"]*[/\\]")
"""All of a path but its last part."""
ERROR = {
    "description": "the same message under three names",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {name: {"type": "string"} for name in ("message", "error", "detail")},
                "required": ["message", "error", "detail"],
            }
        }
    },
}
NUMBER = {"type": "number"}
INTEGER = {"type": "integer"}
TEXT = {"type": "string"}


def _object(optional: dict[str, Any] | None = None, **required: Any) -> dict[str, Any]:
    return {"type": "object", "properties": required | (optional or {}), "required": [*required]}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


BESIDE = {
    "cutoff_layer": INTEGER,
    "chunk": _object(start=INTEGER, end=INTEGER),
    "is_truncated": {"const": True},
}
FUSION_SCORES = {name: NUMBER for name in ("model_score", "first_stage_score", "fused_score")}
RESULT = BESIDE | FUSION_SCORES
USAGE = _object({"operations": INTEGER}, prompt_tokens=INTEGER, total_tokens=INTEGER)
RANKED = {
    "anyOf": [
        _object(
            id=TEXT,
            model=TEXT,
            results=_list(_object({"document": {"type": "object"}} | RESULT, index=INTEGER, relevance_score=NUMBER)),
            meta={"type": "object"},
            usage=USAGE,
        ),
        _object(
            object={"const": "list"},
            data=_list(_object({"document": TEXT} | RESULT, index=INTEGER, relevance_score=NUMBER)),
            model=TEXT,
            usage=USAGE,
        ),
        _list(_object({"text": TEXT} | RESULT, index=INTEGER, score=NUMBER)),
    ]
}
SCORES = _object(
    id=TEXT,
    object={"const": "list"},
    created=INTEGER,
    model=TEXT,
    data=_list(_object(BESIDE, index=INTEGER, object={"const": "score"}, score=NUMBER)),
    usage=USAGE,
)
ERRORS = {
    "/live": (),
    "/health": (503,),
    "/ready": (503,),
    "/info": (503,),
    "/v1/models/{model_id}": (404,),
}
ERRORS_OF_RANKING = (408, 413, 415, 422, 429, 500, 503)


def checkpoint_facts(reranker: MatryoshkaReranker) -> dict[str, dict[str, Any]]:
    """What the checkpoint says of itself, and where; an instruction that the server was started with comes first. Of a
    path in a source, which may be one of this machine, the last part is left."""
    found = reranker.description.to_json()
    if reranker.instruction is not None:
        found["instruction"] = {"value": reranker.instruction, "source": "the server's --instruction"}
    return {name: fact | {"source": FOLDERS.sub("", fact["source"])} for name, fact in found.items()}


def describe(path: str, body: dict[str, Any] | None = None, secured: bool = False) -> dict[str, Any]:
    """Arguments of FastAPI's decorators for a route.

    Args:
        body: the JSON schema of what is posted, if anything is.
        secured: whether it asks for the token.
    """
    name = path.strip("/").replace("/", "_")
    if body is None:
        return {"responses": {status: ERROR for status in ERRORS[path]}, "operation_id": name}
    answer = SCORES if path.endswith("score") else RANKED
    responses: dict[int | str, Any] = {status: ERROR for status in ERRORS_OF_RANKING}
    responses[200] = {"description": "scores", "content": {"application/json": {"schema": answer}}}
    if secured:
        responses[401] = ERROR
    asked = {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}}
    return {"responses": responses, "openapi_extra": asked, "operation_id": name}
