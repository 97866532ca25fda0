"""The HTTP application: routes, bearer token, errors, and their OpenAPI document."""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.serve.forms import (
    INFINITY,
    INFINITY_SCHEMA,
    RERANK,
    RERANK_SCHEMA,
    SCORE,
    SCORE_SCHEMA,
    InfinityAnswer,
    RerankAnswer,
    ScoreAnswer,
)
from flagembedding_matryoshka.serve.limits import Limits
from flagembedding_matryoshka.serve.logs import RequestIds
from flagembedding_matryoshka.serve.model import check_degrade_to
from flagembedding_matryoshka.serve.page import add_page
from flagembedding_matryoshka.serve.service import Service
from flagembedding_matryoshka.setting import COMPRESS_RATIOS

MAX_MESSAGE = 1000
"""Most characters of an error message, which may quote a client's body."""
FOLDERS = re.compile(r"(?<=: ).*[/\\]|[^\s'\"]*[/\\]")
"""Everything of a path except its last component."""
ERRORS_OF_RANKING = (408, 413, 415, 422, 429, 500, 503)


class Error(TypedDict):
    """One message under the three names that clients of Cohere, TEI and Jina read."""

    message: str
    error: str
    detail: str


def create_app(
    reranker: MatryoshkaReranker | Future[MatryoshkaReranker],
    name: str,
    limits: Limits | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """Make a re-rank server for clients of Cohere, Jina, Voyage, Xinference, vLLM and text-embeddings-inference.

    Args:
        reranker: the re-ranker, or its future; until the future is done the server is alive and not ready.
        name: name of the model, for clients.
        limits: limits of requests; None is `Limits()`.
        api_key: bearer token that /rerank and /score require; None requires none.

    Raises:
        ValueError: if the re-ranker is loaded and `limits.degrade_to` is not one of its exits, or not shallower than
            its own depth.
    """
    limits = limits or Limits()
    if not isinstance(reranker, Future):
        check_degrade_to(limits.degrade_to, reranker)
        loaded: Future[MatryoshkaReranker] = Future()
        loaded.set_result(reranker)
        reranker = loaded
    service = Service(reranker, name, limits)
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPIOffline(title="flagembedding_matryoshka", redoc_url=None, lifespan=lifespan)
    app.add_middleware(RequestIds)
    app.add_exception_handler(HTTPException, _explain)
    app.add_exception_handler(Exception, _internal_error)

    def answering(form: Any) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            with service.metrics.request():
                if api_key is not None:
                    _authorize(request, api_key)
                return JSONResponse(await service.answer(request, form))

        return answer

    # Only for the OpenAPI document: `answer` checks the token, so that refusals are counted and explained.
    token = [] if api_key is None else [Security(HTTPBearer(auto_error=False))]
    errors = (*ERRORS_OF_RANKING, 401) if token else ERRORS_OF_RANKING
    for paths, form, schema, answer in (
        (("/rerank", "/v1/rerank", "/v2/rerank"), RERANK, RERANK_SCHEMA, RerankAnswer),
        (("/infinity/rerank",), INFINITY, INFINITY_SCHEMA, InfinityAnswer),
        (("/score", "/v1/score"), SCORE, SCORE_SCHEMA, ScoreAnswer),
    ):
        for path in paths:
            app.post(path, dependencies=token, **_describe(path, errors, schema, answer))(answering(form))

    async def live() -> dict[str, str]:
        return {"status": "ok"}

    async def health() -> dict[str, str]:
        await service.check_health()
        return {"status": "ok", "model": service.name}

    for path, probe, failures in (("/live", live, ()), ("/health", health, (503,)), ("/ready", health, (503,))):
        app.get(path, **_describe(path, failures))(probe)
        app.head(path, include_in_schema=False)(probe)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    model = {"id": name, "object": "model", "created": started, "owned_by": "flagembedding_matryoshka"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id}", **_describe("/v1/models/{model_id}", (404,)))
    async def one_model(model_id: str) -> dict[str, Any]:
        if model_id != name:
            raise HTTPException(404, f"the model is {name!r}")
        return model | {"model_type": "rerank"}

    @app.get("/info", **_describe("/info", (503,)))
    async def info() -> dict[str, Any]:
        reranker = service.reranker
        return {
            "model_id": name,
            "model_dtype": str(reranker.model.dtype).removeprefix("torch."),
            "model_type": {"reranker": {"id2label": {"0": "relevance"}, "label2id": {"relevance": 0}}},
            "max_input_length": reranker.max_length,
            "max_batch_tokens": reranker.max_tokens_per_batch,
            "max_client_batch_size": service.limits.documents,
            "max_concurrent_requests": service.limits.requests,
            "auto_truncate": True,
            "exits": reranker.config.exit_layers,
            "num_hidden_layers": reranker.config.num_hidden_layers,
            "compress_ratios": COMPRESS_RATIOS,
            "fusion": await service.fusion_weights(),
            "checkpoint": _checkpoint_facts(reranker),
        }

    add_page(app)
    return app


def _describe(path: str, errors: Sequence[int], schema: Any = None, answer: Any = None) -> dict[str, Any]:
    """Return arguments of FastAPI's decorators that describe a route.

    Args:
        errors: statuses of the route's errors.
        schema: JSON schema of the body; None is no body.
        answer: type of the answer; None leaves it to FastAPI.
    """
    responses: dict[int | str, Any] = {status: {"model": Error, "description": "an error"} for status in errors}
    described: dict[str, Any] = {"responses": responses, "operation_id": path.strip("/").replace("/", "_")}
    if schema is not None:
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        described["openapi_extra"] = {"requestBody": body}
    if answer is not None:
        responses[200] = {"model": answer, "description": "scores"}
    return described


def _checkpoint_facts(reranker: MatryoshkaReranker) -> dict[str, dict[str, Any]]:
    """Return value and source of each fact about the checkpoint; of a path only the last component.

    An instruction that the server was started with overrides the checkpoint's.
    """
    found = reranker.description.to_json()
    if reranker.instruction is not None:
        found["instruction"] = {"value": reranker.instruction, "source": "the server's --instruction"}
    return {name: fact | {"source": FOLDERS.sub("", fact["source"])} for name, fact in found.items()}


def _authorize(request: Request, api_key: str) -> None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    # A header's bytes arrive as Latin-1. str.strip() would remove 0xA0 and 0x85, which end letters in UTF-8.
    given = token.strip(" \t").encode("latin-1")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given, api_key.encode()):
        raise HTTPException(
            401, "the bearer token is missing or wrong: send Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"}
        )


async def _explain(request: Request, error: Any) -> Response:
    """Answer an error as `Error`."""
    content = dict.fromkeys(("message", "error", "detail"), f"{error.detail:.{MAX_MESSAGE}}")
    return JSONResponse(content, error.status_code, error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    return await _explain(request, HTTPException(500, "internal error"))
