"""From a body to an answer: what is refused, what waits, and who computes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import torch
from fastapi import Request
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.inference.scoring import Hit
from flagembedding_matryoshka.serve.answers import Scored
from flagembedding_matryoshka.serve.batching import Batcher
from flagembedding_matryoshka.serve.bodies import CLIENT_CLOSED_REQUEST, RETRY_AFTER, Bodies
from flagembedding_matryoshka.serve.metrics import Metrics
from flagembedding_matryoshka.serve.schemas import Request as Asked
from flagembedding_matryoshka.serve.schemas import parse
from flagembedding_matryoshka.serve.scoring import Scorer, Work, check_degrade_to, is_shallower
from flagembedding_matryoshka.serve.shortening import Lengths

MOST_NAMES = 1000
DEGRADE_ABOVE = 0.5
"""Share of the requests that may wait or be computed."""
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What the server refuses, and what it answers with less than all of its layers.

    Attributes:
        documents: in a request, or chunks of them, at most, else 422.
        body_bytes: of a request, at most, else 413; of all that are being read, 32 times as many, else 429 for the
            oldest of them.
        requests: that wait or are computed at one time, at most, else 429.
        batch_requests: that are computed together, at most; None is as many as the tokens of a batch allow.
        body_seconds: from a request's header to the end of its body, at most, else 408.
        degrade_to: the exit at which requests are answered that name no depth, no `min_score` and no calibration, while
            those that wait or are computed are more than half of `requests`; None is none.
    """

    documents: int = 1000
    body_bytes: int = 8_000_000
    requests: int = 512
    batch_requests: int | None = None
    body_seconds: float = 30.0
    degrade_to: int | None = None


class Service:
    """Answers re-rank requests with one re-ranker.

    Args:
        loading: the re-ranker, or what will be one.
        name: of the model, for clients.
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
        """Inside, requests are answered, once the model is loaded."""
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
        """The loaded one.

        Raises:
            HTTPException: 503 before.
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
        """The answer to a request of this form, as JSON values.

        Raises:
            HTTPException: 408, 413, 415, 422, 429, 500, 503, or 499 for a client that did not wait.
        """
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
        """Log fields that do nothing, each once."""
        new = {name[:40] for name, value in (asked.model_extra or {}).items() if value is not None}
        new -= self._unknown_fields
        if new and len(self._unknown_fields) < MOST_NAMES:
            self._unknown_fields |= new
            logger.warning("requests have fields that are unknown and do nothing: %s", sorted(new))

    async def score(self, asked: Asked, arrived: float) -> Scored:
        """Scores of a request, computed together with others'.

        Args:
            arrived: what `time.monotonic` said when it did.

        Raises:
            HTTPException: 422, if the request does not fit the model; 503, if it does not fit into memory; 500, if the
                model fails.
        """
        scorer, batcher = self._ready()
        works = []
        try:
            degraded = self._degrades(asked)
            setting = asked.setting | ({"cutoff_layers": self.limits.degrade_to} if degraded else {})
            instruction = asked.wanted_instruction
            of_scale = (setting, asked.scores_shown, asked.deadline_ms, instruction)
            scale = await asyncio.to_thread(scorer.scale, *of_scale)
            fusion = await asyncio.to_thread(scorer.fusion, asked.fusion, asked.first_stage_of_documents)
            for query, texts in asked.lists:
                of_work = (query, texts, setting, asked.lengths, asked.chunks, instruction, fusion)
                work = await asyncio.to_thread(scorer.prepare, *of_work)
                if len(work.pairs) > self.limits.documents:
                    raise HTTPException(422, f"{len(work.pairs)} chunks are more than {self.limits.documents}")
                end = None if asked.deadline_ms is None else arrived + asked.deadline_ms / 1000
                works.append(replace(work, end=end, shows_exit=degraded))
        except (TypeError, ValueError) as error:
            raise HTTPException(422, str(error)) from error
        if degraded:
            self.metrics.degraded()
        hurried = [work for work in works if work.end is not None]
        scorer.hurried += len(hurried)
        try:
            found = await asyncio.gather(*(self._compute(batcher, work) for work in works))
        finally:
            scorer.hurried -= len(hurried)
        operations = None
        if asked.counts_operations:
            counted = map(scorer.count_operations, works, found)
            operations = await asyncio.to_thread(sum, counted)
        tokens = sum(work.all_tokens for work in works)
        hits = [work.hits(own) for work, own in zip(works, found, strict=True)]
        depth = works[0].setting.depth
        return Scored(
            list(chain.from_iterable(hits)),
            tokens,
            self.name,
            scale,
            depth,
            asked.min_score,
            operations,
            None if fusion is None else fusion.weight,
            is_raw=asked.scores_shown["normalize"] is False,
        )

    def _degrades(self, asked: Asked) -> bool:
        """Whether a request is answered at `degrade_to`; raises as `MatryoshkaReranker.setting`."""
        scorer, batcher = self._ready()
        exit = self.limits.degrade_to
        if exit is None or asked.needs_its_depth or batcher.waiting <= DEGRADE_ABOVE * self.limits.requests:
            return False
        return is_shallower(exit, scorer.reranker.setting(**asked.setting))

    async def _compute(self, batcher: Batcher, work: Work) -> Sequence[Hit]:
        try:
            return await batcher.submit(work.key, work.items, work.shared_tokens, work.tokens, work.divisible)
        except (torch.OutOfMemoryError, MemoryError) as error:
            logger.exception("a request of %d documents does not fit into memory", len(work.pairs))
            raise HTTPException(503, "the request does not fit into memory; send shorter texts", RETRY_AFTER) from error
        except ArithmeticError as error:
            logger.exception("the model gave a score that is not a number")
            raise HTTPException(500, "the model gave a score that is not a number") from error
        except Exception as error:
            logger.exception("the model failed on a request of %d documents", len(work.pairs))
            raise HTTPException(500, "internal error") from error

    async def check_health(self) -> None:
        """Whether the model computes. It is asked only if its last computation failed.

        Raises:
            HTTPException: 503 if it is being loaded, or fails.
        """
        scorer, batcher = self._ready()
        if batcher.failing:
            try:
                work = scorer.prepare("query", ["document"], {}, Lengths())
                await batcher.submit(work.setting, work.pairs, work.shared_tokens, work.tokens)
            except Exception as error:
                raise HTTPException(503, "the model fails", RETRY_AFTER) from error


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
