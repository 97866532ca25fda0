"""The HTTP side: routes, token, errors, and the document that tells of them."""

from __future__ import annotations

import hmac
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.serve.description import checkpoint_facts, describe
from flagembedding_matryoshka.serve.logs import RequestIds
from flagembedding_matryoshka.serve.page import add_page
from flagembedding_matryoshka.serve.schemas import RERANK, RERANK_SCHEMA, SCORE, SCORE_SCHEMA
from flagembedding_matryoshka.serve.scoring import check_degrade_to
from flagembedding_matryoshka.serve.service import Limits, Service
from flagembedding_matryoshka.setting import COMPRESS_RATIOS

LONGEST_MESSAGE = 1000
"""Characters of an error: what it says may be of the client's making."""


def create_app(
    reranker: MatryoshkaReranker | Future[MatryoshkaReranker],
    name: str,
    limits: Limits | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """A re-rank server for clients of Cohere, Jina, Voyage, Xinference, vLLM and text-embeddings-inference.

    Args:
        reranker: or what will be one: until then the server is alive, and not ready.
        name: of the model, for clients.
        limits: None is `Limits()`.
        api_key: the bearer token that re-ranking asks for; None asks for none.

    Raises:
        ValueError: if `limits` degrade to an exit that a loaded re-ranker does not have, or to none shallower than its
            own depth.
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

    # The document tells of the token; what checks it counts and explains refusals.
    token = [] if api_key is None else [Security(HTTPBearer(auto_error=False))]
    for paths, form, schema in (
        (("/rerank", "/v1/rerank", "/v2/rerank"), RERANK, RERANK_SCHEMA),
        (("/score", "/v1/score"), SCORE, SCORE_SCHEMA),
    ):
        for path in paths:
            app.post(path, dependencies=token, **describe(path, schema, bool(token)))(answering(form))

    async def live() -> dict[str, str]:
        return {"status": "ok"}

    async def health() -> dict[str, str]:
        await service.check_health()
        return {"status": "ok", "model": service.name}

    for path, probe in (("/live", live), ("/health", health), ("/ready", health)):
        app.get(path, **describe(path))(probe)
        app.head(path, include_in_schema=False)(probe)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    model = {"id": name, "object": "model", "created": started, "owned_by": "flagembedding_matryoshka"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id}", **describe("/v1/models/{model_id}"))
    async def one_model(model_id: str) -> dict[str, Any]:
        if model_id != name:
            raise HTTPException(404, f"the model is {name!r}")
        return model | {"model_type": "rerank"}

    @app.get("/info", **describe("/info"))
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
            "checkpoint": checkpoint_facts(reranker),
        }

    add_page(app)
    return app


def _authorize(request: Request, api_key: str) -> None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    # The bytes of a header arrive as Latin-1, whatever they are.
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode("latin-1"), api_key.encode()):
        raise HTTPException(401, "a valid bearer token is wanted", {"WWW-Authenticate": "Bearer"})


async def _explain(request: Request, error: Any) -> Response:
    """The message under the names that clients of Cohere, TEI and Jina look for."""
    content = dict.fromkeys(("message", "error", "detail"), f"{error.detail:.{LONGEST_MESSAGE}}")
    return JSONResponse(content, error.status_code, error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    return await _explain(request, HTTPException(500, "internal error"))
