"""From the body of a request to its answer: parse, tokenise, wait for a batch, write the answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

import torch
from fastapi import Request
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.inference.scoring import Hit
from flagembedding_matryoshka.serve.batching import Batcher
from flagembedding_matryoshka.serve.forms import parse
from flagembedding_matryoshka.serve.forms.common import Request as Asked
from flagembedding_matryoshka.serve.forms.common import RequestScores
from flagembedding_matryoshka.serve.limits import CLIENT_CLOSED_REQUEST, CLOSE, RETRY_AFTER, Bodies, Limits
from flagembedding_matryoshka.serve.metrics import Metrics
from flagembedding_matryoshka.serve.model import Scorer, Task, check_degrade_to, is_shallower
from flagembedding_matryoshka.serve.truncation import Lengths

MAX_LOGGED_NAMES = 1000
"""Most unknown fields that are logged, each once."""
DEGRADE_ABOVE = 0.5
"""Fraction of `Limits.requests`."""
T = TypeVar("T")
logger = logging.getLogger(__name__)


class Service:
    """Answer re-rank requests with one re-ranker.

    Args:
        loading: future of the re-ranker.
        name: name of the model, for clients.
        limits: limits of requests.
    """

    def __init__(self, loading: Future[MatryoshkaReranker], name: str, limits: Limits) -> None:
        self.name = name
        self.limits = limits
        self.metrics = Metrics(lambda: 0 if self._batcher is None else self._batcher.waiting, limits.requests)
        self._loading = loading
        self._scorer: Scorer | None = None
        self._batcher: Batcher | None = None
        self._in_flight = 0
        self._bodies = Bodies(limits.body_bytes, limits.body_seconds)
        self._unknown_fields: set[str] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer requests while the context is open, as soon as the model is loaded."""
        if self._loading.done():
            await self._start()
            starting = None
        else:
            starting = asyncio.create_task(self._start())
        try:
            yield
        finally:
            if starting is not None:
                starting.cancel()
            if self._batcher is not None:
                await self._batcher.__aexit__()

    async def _start(self) -> None:
        try:
            reranker = await asyncio.wrap_future(self._loading)
            check_degrade_to(self.limits.degrade_to, reranker)
            if reranker.description.is_assumed:
                logger.warning("%s", reranker.description.assumption)
            self._scorer = Scorer(reranker)
        except Exception as error:
            logger.error("the model cannot be loaded: %s", error)
            return
        limit = self.limits.batch_requests
        self._batcher = Batcher(self._scorer.compute, self._scorer.max_tokens, limit, self.metrics.batch)
        await self._batcher.__aenter__()

    @property
    def reranker(self) -> MatryoshkaReranker:
        """The loaded re-ranker.

        Raises:
            HTTPException: 503 before the model is loaded.
        """
        return self._ready()[0].reranker

    async def fusion_weights(self) -> dict[str, float | None]:
        """Return `Scorer.fusion_weights`.

        Raises:
            HTTPException: 503 before the model is loaded.
        """
        scorer, _ = self._ready()
        return await asyncio.to_thread(lambda: scorer.fusion_weights)

    def _ready(self) -> tuple[Scorer, Batcher]:
        if self._scorer is None or self._batcher is None:
            raise HTTPException(503, "the model is not loaded yet", RETRY_AFTER)
        return self._scorer, self._batcher

    async def answer(self, request: Request, form: TypeAdapter[Any]) -> Any:
        """Answer a request, as JSON values.

        Args:
            form: the form of the request's body.

        Raises:
            HTTPException: 408, 413, 415, 422, 429, 500, 503, or 499 if the client closes the connection.
        """
        try:
            return await self._answer(request, form)
        except asyncio.CancelledError as error:  # uvicorn cancels requests when the time of its shutdown is over
            raise HTTPException(503, "the server is shutting down; try again later", RETRY_AFTER | CLOSE) from error

    async def _answer(self, request: Request, form: TypeAdapter[Any]) -> Any:
        arrived = time.monotonic()
        self._ready()
        self._refuse_more_than(self.limits.requests)
        asked: Asked = await self._read(request, form)
        self._refuse_more_than(self.limits.requests)
        self._in_flight += 1
        try:
            return asked.answer(await unless_disconnected(request, self.score(asked, arrived)))
        finally:
            self._in_flight -= 1

    def _refuse_more_than(self, requests: int) -> None:
        if self._in_flight >= requests:
            raise HTTPException(429, f"{self._in_flight} requests are being served; try again later", RETRY_AFTER)

    async def _read(self, request: Request, form: TypeAdapter[Asked]) -> Asked:
        body = await self._bodies.read(request)
        try:
            asked = await asyncio.to_thread(parse, body, form)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        if (documents := sum(len(texts) for _, texts in asked.lists)) > self.limits.documents:
            raise HTTPException(422, f"{documents} documents are more than {self.limits.documents}")
        self._note_unknown(asked)
        return asked

    def _note_unknown(self, asked: Asked) -> None:
        """Log the names of unknown fields, each once."""
        new = {name[:40] for name, value in (asked.model_extra or {}).items() if value is not None}
        new -= self._unknown_fields
        if new and len(self._unknown_fields) < MAX_LOGGED_NAMES:
            self._unknown_fields |= new
            logger.warning("requests have fields that are unknown and do nothing: %s", sorted(new))

    async def score(self, asked: Asked, arrived: float) -> RequestScores:
        """Score the documents of a request, in batches with documents of other requests.

        Args:
            arrived: time of the request's arrival, as a value of `time.monotonic`.

        Raises:
            HTTPException: 422 if the request does not fit the model, 503 if it does not fit into memory, 500 if the
                model fails.
        """
        scorer, batcher = self._ready()
        tasks = []
        try:
            degraded = self._degrades(asked)
            setting = asked.setting | ({"cutoff_layers": self.limits.degrade_to} if degraded else {})
            instruction = asked.any_instruction
            of_scale = (setting, asked.normalizer, asked.deadline_ms, instruction)
            scale = await asyncio.to_thread(scorer.scale, *of_scale)
            fusion = await asyncio.to_thread(scorer.fusion, asked.fusion, asked.first_stage_of_documents)
            for query, texts in asked.lists:
                arguments = (query, texts, setting, asked.lengths, asked.chunks, instruction, fusion)
                task = await asyncio.to_thread(scorer.prepare, *arguments)
                if len(task.pairs) > self.limits.documents:
                    raise HTTPException(422, f"{len(task.pairs)} chunks are more than {self.limits.documents}")
                end = None if asked.deadline_ms is None else arrived + asked.deadline_ms / 1000
                tasks.append(replace(task, end=end, shows_exit=degraded))
        except (TypeError, ValueError) as error:
            raise HTTPException(422, str(error)) from error
        if degraded:
            self.metrics.degraded()
        deadlines = sum(task.end is not None for task in tasks)
        scorer.deadlines += deadlines
        try:
            found = await asyncio.gather(*(self._compute(batcher, task) for task in tasks))
        finally:
            scorer.deadlines -= deadlines
        operations = None
        if asked.counts_operations:
            counted = map(scorer.count_operations, tasks, found)
            operations = await asyncio.to_thread(sum, counted)
        tokens = sum(task.all_tokens for task in tasks)
        hits = [task.hits(own) for task, own in zip(tasks, found, strict=True)]
        depth = tasks[0].setting.depth
        return RequestScores(
            list(chain.from_iterable(hits)),
            tokens,
            self.name,
            scale,
            depth,
            asked.min_score,
            operations,
            None if fusion is None else fusion.weight,
            is_raw=asked.normalizer["normalize"] is False,
        )

    def _degrades(self, asked: Asked) -> bool:
        """Return whether a request is answered at `degrade_to`. Raises as `MatryoshkaReranker.setting`."""
        scorer, batcher = self._ready()
        exit = self.limits.degrade_to
        if exit is None or asked.fixes_depth or batcher.waiting <= DEGRADE_ABOVE * self.limits.requests:
            return False
        return is_shallower(exit, scorer.reranker.setting(**asked.setting))

    async def _compute(self, batcher: Batcher, task: Task) -> Sequence[Hit]:
        try:
            return await batcher.submit(task.key, task.items, task.shared_tokens, task.tokens, task.divisible)
        except (torch.OutOfMemoryError, MemoryError) as error:
            logger.exception("a request of %d documents does not fit into memory", len(task.pairs))
            raise HTTPException(503, "the request does not fit into memory; send shorter texts", RETRY_AFTER) from error
        except ArithmeticError as error:
            logger.exception("the model gave a score that is not a number")
            raise HTTPException(500, "the model gave a score that is not a number") from error
        except Exception as error:
            logger.exception("the model failed on a request of %d documents", len(task.pairs))
            raise HTTPException(500, "internal error") from error

    async def check_health(self) -> None:
        """Score one pair if the last computation failed.

        Raises:
            HTTPException: 503 if the model is not loaded, or fails.
        """
        scorer, batcher = self._ready()
        if batcher.failing:
            try:
                task = scorer.prepare("query", ["document"], {}, Lengths())
                await batcher.submit(task.setting, task.pairs, task.shared_tokens, task.tokens)
            except Exception as error:
                raise HTTPException(503, "the model fails", RETRY_AFTER) from error


async def unless_disconnected(request: Request, coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine. Cancel it if the client closes the connection.

    Raises:
        HTTPException: 499 if the client closes the connection.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.ensure_future(coroutine), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise CLIENT_CLOSED_REQUEST
        return working.result()
    finally:
        working.cancel()
        waiting.cancel()
