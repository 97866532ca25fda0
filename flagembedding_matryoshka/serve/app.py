"""The HTTP application: routes, bearer token, errors, and their OpenAPI document."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Receive, Scope, Send

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.serve.document import (
    INFINITY_OPERATION,
    INFO,
    LIVE,
    METRICS,
    MODELS,
    ONE_MODEL,
    READY,
    RERANK_OPERATION,
    SCORE_OPERATION,
    Operation,
)
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
from flagembedding_matryoshka.serve.keys import Keys
from flagembedding_matryoshka.serve.limits import Limits
from flagembedding_matryoshka.serve.logs import AccessLog, with_request_id
from flagembedding_matryoshka.serve.model import check_cache, check_degrade_to
from flagembedding_matryoshka.serve.page import add_page
from flagembedding_matryoshka.serve.service import Admission, Service
from flagembedding_matryoshka.serve.tracing import trace_requests
from flagembedding_matryoshka.setting import COMPRESS_RATIOS

MAX_MESSAGE = 1000
"""Most characters of an error message, which may quote a client's body."""
FOLDERS = re.compile(r"(?<=: ).*[/\\]|[^\s'\"]*[/\\]")
"""Everything of a path except its last component."""
FINGERPRINT = "X-Model-Fingerprint"
"""The header of an answer with the fingerprint of the model that computed it."""
PIECE = 2**16
"""Bytes of an answer that are sent at a time."""


class ResponseInPieces(JSONResponse):
    """An answer that is sent in pieces: the next one when the client has read most of the one before."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), PIECE):
            await send({"type": "http.response.body", "body": self.body[start : start + PIECE], "more_body": True})
        await send({"type": "http.response.body"})


def create_app(
    reranker: MatryoshkaReranker | Future[MatryoshkaReranker],
    name: str,
    limits: Limits | None = None,
    api_key: str | Keys | None = None,
    protect_all: bool = False,
    allow_origins: Sequence[str] = (),
    allowed_hosts: Sequence[str] = ("*",),
    store: str | PathLike[str] | None = None,
) -> FastAPI:
    """Make a re-rank server for clients of Cohere, Jina, Voyage, Xinference, vLLM and text-embeddings-inference.

    Args:
        reranker: the re-ranker, or its future; until the future is done the server is alive and not ready.
        name: name of the model, for clients.
        limits: limits of requests; None is `Limits()`.
        api_key: bearer token that /rerank and /score require, or several; None requires none.
        protect_all: whether /info, /v1/models and /metrics require it, too.
        allow_origins: origins of other sites' pages that may ask the server, such as "https://example.com"; "*" is all.
        allowed_hosts: values of the Host header that are answered, without port; "*" is all.
        store: directory of stored passages, which requests may name by their ids; None is none.

    Returns:
        The application. `app.state.service.reload` replaces its re-ranker, see `Service.reload`.

    Raises:
        FileNotFoundError: if the re-ranker is loaded, and there is no store.
        ValueError: if the API key is empty, `protect_all` is without a key, `limits.cache_bytes` has no room for a
            score, or the re-ranker is loaded and `limits.degrade_to` is not one of its exits, or not shallower than its
            own depth, or another model wrote the store, or `limits.cache_bytes` is given and its scores depend on their
            batch.
    """
    limits = limits or Limits()
    keys = Keys.of_one(api_key.encode(), "api_key") if isinstance(api_key, str) else api_key
    if protect_all and keys is None:
        raise ValueError("protect_all needs an API key.")
    if not isinstance(reranker, Future):
        check_degrade_to(limits.degrade_to, reranker)
        check_cache(limits.cache_bytes, reranker.model.model.batch_invariant)
        if store is not None:
            reranker.open_store(store)
        loaded: Future[MatryoshkaReranker] = Future()
        loaded.set_result(reranker)
        reranker = loaded
    service = Service(reranker, name, limits, None if store is None else Path(store))
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPIOffline(title="flagembedding_matryoshka", redoc_url=None, lifespan=lifespan)
    app.state.service = service
    if allow_origins:
        app.add_middleware(CORSMiddleware, allow_origins=allow_origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts, www_redirect=False)
    app.add_middleware(AccessLog)
    app.add_middleware(with_request_id)
    trace_requests(app)
    app.add_exception_handler(HTTPException, _explain)
    app.add_exception_handler(Exception, _internal_error)

    async def admitted(request: Request) -> AsyncIterator[Admission]:
        # FastAPI goes on behind `yield` when the answer is written.
        with service.metrics.request(request.scope["route"].path):
            async with service.admission() as admission:
                yield admission

    def authorize(request: Request) -> None:
        if keys is not None:
            _authorize(request, keys)

    admission = Depends(admitted)

    def answering(form: Any) -> Callable[[Request], Any]:
        async def answer(request: Request, admission: Admission = admission) -> Response:
            authorize(request)
            content, fingerprint = await service.answer(request, admission, form)
            answer = ResponseInPieces(content, headers={FINGERPRINT: fingerprint})
            admission.share.hold(len(answer.body))
            return answer

        return answer

    # Only for the OpenAPI document: `answer` checks the token, so that refusals are counted and explained.
    token = [] if keys is None else [Security(HTTPBearer(auto_error=False))]
    protected = [*token, Depends(authorize)] if protect_all else []
    of_protected = (401,) if protect_all else ()
    errors = (401,) if token else ()
    for paths, operation, form, schema, answer in (
        (("/rerank", "/v1/rerank", "/v2/rerank"), RERANK_OPERATION, RERANK, RERANK_SCHEMA, RerankAnswer),
        (("/infinity/rerank",), INFINITY_OPERATION, INFINITY, INFINITY_SCHEMA, InfinityAnswer),
        (("/score", "/v1/score"), SCORE_OPERATION, SCORE, SCORE_SCHEMA, ScoreAnswer),
    ):
        for path in paths:
            app.post(path, dependencies=token, **operation.described(path, schema, answer, errors))(answering(form))

    def described(operation: Operation, path: str) -> dict[str, Any]:
        return operation.described(path, more_errors=of_protected) | {"dependencies": protected}

    async def live() -> dict[str, str]:
        return {"status": "ok"}

    async def health() -> dict[str, str]:
        await service.check_health()
        return {"status": "ok", "model": service.name, "fingerprint": service.fingerprint}

    for path, probe, operation in (("/live", live, LIVE), ("/health", health, READY), ("/ready", health, READY)):
        app.get(path, **operation.described(path))(probe)
        app.head(path, include_in_schema=False)(probe)

    @app.get("/metrics", response_class=PlainTextResponse, **described(METRICS, "/metrics"))
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    model = {"id": name, "object": "model", "created": started, "owned_by": "flagembedding_matryoshka"}

    @app.get("/v1/models", **described(MODELS, "/v1/models"))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id}", **described(ONE_MODEL, "/v1/models/{model_id}"))
    async def one_model(model_id: str) -> dict[str, Any]:
        if model_id != name:
            raise HTTPException(404, f"the model is {name!r}")
        return model | {"model_type": "rerank"}

    @app.get("/info", **described(INFO, "/info"))
    async def info() -> dict[str, Any]:
        reranker = service.reranker
        return {
            "model_id": name,
            "fingerprint": service.fingerprint,
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
            "checkpoint": _checkpoint_facts(reranker),
        } | await service.plan_facts()

    add_page(app)
    return app


def _checkpoint_facts(reranker: MatryoshkaReranker) -> dict[str, dict[str, Any]]:
    """Return value and source of each fact about the checkpoint; of a path only the last component.

    An instruction that the server was started with overrides the checkpoint's.
    """
    found = reranker.description.to_json()
    if reranker.instruction is not None:
        found["instruction"] = {"value": reranker.instruction, "source": "the server's --instruction"}
    return {name: fact | {"source": FOLDERS.sub("", fact["source"])} for name, fact in found.items()}


def _authorize(request: Request, keys: Keys) -> None:
    """Store the name of the request's key for the log.

    Raises:
        HTTPException: 401 if the request has none of the keys.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    # A header's bytes arrive as Latin-1. str.strip() would remove 0xA0 and 0x85, which end letters in UTF-8.
    name = keys.name_of(token.strip(" \t").encode("latin-1")) if scheme.lower() == "bearer" else None
    if name is None:
        raise HTTPException(
            401, "the bearer token is missing or wrong: send Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"}
        )
    request.state.key = name


async def _explain(request: Request, error: Any) -> Response:
    """Answer an error as `document.Error`."""
    content = dict.fromkeys(("message", "error", "detail"), f"{error.detail:.{MAX_MESSAGE}}")
    return JSONResponse(content, error.status_code, error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    return await _explain(request, HTTPException(500, "internal error"))
