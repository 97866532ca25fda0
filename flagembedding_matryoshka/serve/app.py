"""The HTTP side: limits, token, errors, and the routes that lead to one `Batcher`."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.serve.batching import Batcher
from flagembedding_matryoshka.serve.metrics import Metrics
from flagembedding_matryoshka.serve.schemas import BODY_SCHEMA, AnyRequest, Scored, parse
from flagembedding_matryoshka.serve.scoring import Scorer

LONGEST_MESSAGE = 1000
"""Characters of an error: what it says may be of the client's making."""
RETRY_AFTER = {"Retry-After": "1"}
CLIENT_CLOSED_REQUEST = HTTPException(499, "the client closed the connection")
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What the server refuses.

    Attributes:
        documents: in a request, at most, else 422.
        body_bytes: of a request, at most, else 413.
        requests: that are read, wait or are computed at one time, at most, else 429.
        batch_requests: that are computed together, at most; None is as many as the tokens of a batch allow.
    """

    documents: int = 1000
    body_bytes: int = 8_000_000
    requests: int = 512
    batch_requests: int | None = None


class Service:
    """Answers re-rank requests with one re-ranker.

    Args:
        name: of the model, for clients.
    """

    def __init__(self, reranker: MatryoshkaReranker, name: str, limits: Limits) -> None:
        self.name = name
        self.limits = limits
        self.scorer = Scorer(reranker)
        self.metrics = Metrics(lambda: self.batcher.waiting)
        self.batcher = Batcher(self.scorer.compute, self.scorer.max_tokens, limits.batch_requests, self.metrics.batch)
        self._in_flight = 0

    async def rerank(self, request: Request) -> Any:
        """The answer, as JSON values.

        Raises:
            HTTPException: 413, 422, 429, 500, or 499 for a client that did not wait.
        """
        if self._in_flight >= self.limits.requests:
            raise HTTPException(429, f"{self._in_flight} requests are being served; try again later", RETRY_AFTER)
        self._in_flight += 1
        try:
            parsed = await self._read(request)
            return parsed.answer(await unless_disconnected(request, self.score(parsed)))
        finally:
            self._in_flight -= 1

    async def _read(self, request: Request) -> AnyRequest:
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise HTTPException(415, f"a body with Content-Encoding {encoding!r:.40} is not read; send it as it is")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.limits.body_bytes:
            raise HTTPException(413, f"the body is larger than {self.limits.body_bytes} bytes")
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > self.limits.body_bytes:
                    raise HTTPException(413, f"the body is larger than {self.limits.body_bytes} bytes")
        except ClientDisconnect as error:
            raise CLIENT_CLOSED_REQUEST from error
        try:
            parsed = await asyncio.to_thread(parse, bytes(body))
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        if len(parsed.texts) > self.limits.documents:
            raise HTTPException(422, f"{len(parsed.texts)} documents are more than {self.limits.documents}")
        return parsed

    async def score(self, parsed: AnyRequest) -> Scored:
        """Scores of a request, computed together with others'.

        Raises:
            HTTPException: 422, if the request does not fit the model; 500, if the model fails.
        """
        texts = parsed.texts
        try:
            setting, shared, tokens = await asyncio.to_thread(
                self.scorer.check, parsed.query, texts, parsed.setting, not parsed.must_fit
            )
        except (TypeError, ValueError) as error:
            raise HTTPException(422, str(error)) from error
        pairs = [(parsed.query, text) for text in texts]
        try:
            hits = await self.batcher.submit(setting, pairs, shared, tokens, divisible=not setting.cascade)
        except Exception as error:
            logger.exception("the model failed on a request of %d documents", len(texts))
            raise HTTPException(500, "internal error") from error
        return Scored(hits, shared + sum(tokens), self.name)

    async def healthy(self) -> bool:
        """Whether the model computes. It is asked only if its last computation failed."""
        if self.batcher.failing:
            try:
                await self.batcher.submit(self.scorer.reranker.setting(), [("query", "document")], 0, [1])
            except Exception:
                return False
        return True


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away.

    Raises:
        HTTPException: 499, in that case.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise CLIENT_CLOSED_REQUEST
        return working.result()
    finally:
        working.cancel()
        waiting.cancel()


def create_app(
    reranker: MatryoshkaReranker, name: str, limits: Limits | None = None, api_key: str | None = None
) -> FastAPI:
    """A re-rank server for clients of Cohere, Jina and text-embeddings-inference.

    Args:
        name: of the model, for clients.
        limits: None is `Limits()`.
        api_key: the bearer token that re-ranking asks for; None asks for none.
    """
    service = Service(reranker, name, limits or Limits())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.batcher:
            yield

    app = FastAPI(title="flagembedding_matryoshka", lifespan=lifespan)
    app.add_exception_handler(HTTPException, _explain)
    app.add_exception_handler(Exception, _internal_error)

    async def rerank(request: Request) -> Response:
        with service.metrics.request():
            if api_key is not None:
                _authorize(request, api_key)
            return JSONResponse(await service.rerank(request))

    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": BODY_SCHEMA}}}}
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        app.post(path, openapi_extra=body)(rerank)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict[str, str]:
        if not await service.healthy():
            raise HTTPException(503, "the model fails", RETRY_AFTER)
        return {"status": "ok", "model": service.name}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

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
