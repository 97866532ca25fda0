"""From the body of a request to its answer: parse, tokenise, wait for a batch, write the answer."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import Request
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException

from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.inference.scoring import Hit
from flagembedding_matryoshka.serve.batching import Batcher
from flagembedding_matryoshka.serve.cache import ScoreCache, score_keys
from flagembedding_matryoshka.serve.forms import parse
from flagembedding_matryoshka.serve.forms.common import QueryDocuments, RequestScores, Scale
from flagembedding_matryoshka.serve.forms.common import Request as Asked
from flagembedding_matryoshka.serve.limits import (
    CLIENT_CLOSED_REQUEST,
    CLOSE,
    NOT_LOADED,
    RETRY_AFTER,
    Budget,
    Limits,
    Share,
    read_body,
)
from flagembedding_matryoshka.serve.metrics import Metrics
from flagembedding_matryoshka.serve.model import Scorer, Task, check_cache, check_degrade_to, is_shallower
from flagembedding_matryoshka.serve.threads import Threads, in_background
from flagembedding_matryoshka.serve.tracing import queue_span, span
from flagembedding_matryoshka.serve.truncation import Lengths

MAX_LOGGED_NAMES = 1000
"""Most unknown fields that are logged, each once."""
DEGRADE_ABOVE = 0.5
"""Fraction of `Limits.requests`."""
PARSERS, TOKENIZERS = 2, 4
"""Threads that parse bodies, and threads that tokenise. Parsing holds Python's lock; tokenising does not."""
STUCK_SECONDS = 5.0
"""If a request waits longer for its parsing or tokenising, the server is not ready."""
BYTES_OF_A_PAIR = 1024
"""Memory of a tokenised pair and its result, beside four bytes for each token."""
T = TypeVar("T")
logger = logging.getLogger(__name__)


class Service:
    """Answer re-rank requests with one re-ranker.

    Args:
        loading: future of the re-ranker.
        name: name of the model, for clients.
        limits: limits of requests.
        store: directory of stored passages; None is none. It is opened again with each re-ranker.
    """

    def __init__(
        self, loading: Future[MatryoshkaReranker], name: str, limits: Limits, store: Path | None = None
    ) -> None:
        self.name = name
        self.limits = limits
        self._store = store
        self._cache = None if limits.cache_bytes is None else ScoreCache(limits.cache_bytes)
        self.metrics = Metrics(
            lambda: self._in_flight, limits.requests, lambda: self._budget.held, limits.bytes, self._cache
        )
        self._loading = loading
        self._reloads: asyncio.Queue[Callable[[], MatryoshkaReranker]] = asyncio.Queue(1)
        self._scorer: Scorer | None = None
        self._in_flight = 0
        self._budget = Budget(limits.bytes)
        self._unknown_fields: set[str] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer requests while the context is open, as soon as the model is loaded."""
        self._parsers, self._tokenizers = Threads("parse", PARSERS), Threads("tokenise", TOKENIZERS)
        async with Batcher(_compute, 0, self.limits.batch_requests, self.metrics.batch) as self._batcher:
            starting = asyncio.create_task(self._start())
            if self._loading.done():
                await starting
            reloading = asyncio.create_task(self._reload_after(starting))
            try:
                yield
            finally:
                starting.cancel()
                reloading.cancel()
                self._parsers.close()
                self._tokenizers.close()

    async def _start(self) -> None:
        try:
            await self._use(self._loading)
        except Exception as error:
            logger.error("the model cannot be loaded: %s", error)

    def reload(self, load: Callable[[], MatryoshkaReranker]) -> None:
        """Load a re-ranker beside the one that computes, and replace this one between two batches.

        The former re-ranker computes the requests that it has tokenised. Then its memory is released. If the new one
        cannot be loaded, the former stays, and the log says why. Call this in the event loop of `running`.

        Only one re-ranker is loaded at a time. All calls while a load runs are one more load after it.

        Args:
            load: loads the re-ranker, in a thread. It replaces that of an earlier call whose load has not begun.
        """
        if self._reloads.full():
            self._reloads.get_nowait()
        self._reloads.put_nowait(load)

    async def _reload_after(self, starting: asyncio.Task[None]) -> None:
        await asyncio.wait([starting])
        while True:
            load = await self._reloads.get()
            logger.info("%s is loaded again", self.name)
            try:
                await self._use(in_background(load))
                self.metrics.reloaded("loaded")
            except Exception as error:
                logger.error("the model cannot be loaded again, and stays as it was: %s", error)
                self.metrics.reloaded("failed")

    async def _use(self, loading: Future[MatryoshkaReranker]) -> None:
        """Wait for a re-ranker, compute later requests with it, and end the former one after its last request.

        Raises: the error of loading, or as `check_degrade_to`, `check_cache` and `Scorer`.
        """
        reranker = await asyncio.wrap_future(loading)
        check_degrade_to(self.limits.degrade_to, reranker)
        check_cache(self.limits.cache_bytes, reranker.model.model.batch_invariant)
        if reranker.description.is_assumed:
            logger.warning("%s", reranker.description.assumption)
        scorer = await asyncio.to_thread(Scorer, reranker, self._store)
        # The former future holds the former re-ranker.
        former, self._scorer, self._loading = self._scorer, scorer, loading
        self._batcher.max_tokens = scorer.max_tokens
        self.metrics.model(scorer.fingerprint)
        logger.info("%s is ready %s", self.name, scorer.summary)
        if former is not None:
            await former.end()

    @property
    def reranker(self) -> MatryoshkaReranker:
        """The loaded re-ranker.

        Raises:
            HTTPException: 503 before the model is loaded.
        """
        return self._ready().reranker

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model, see `model_fingerprint`.

        Raises:
            HTTPException: 503 before the model is loaded.
        """
        return self._ready().fingerprint

    async def plan_facts(self) -> dict[str, Any]:
        """Return `Scorer.fusion_weights` and `Scorer.presets`, which a plan may change, and `Scorer.stored`.

        Raises:
            HTTPException: 503 before the model is loaded.
        """
        scorer = self._ready()
        return await self._tokenizers.run(
            lambda: {"fusion": scorer.fusion_weights, "presets": scorer.presets} | scorer.stored
        )

    def _ready(self) -> Scorer:
        if self._scorer is None:
            raise HTTPException(503, NOT_LOADED, RETRY_AFTER)
        return self._scorer

    @asynccontextmanager
    async def admission(self) -> AsyncIterator[Admission]:
        """Admit a request. It counts, and its memory does, until the context is closed: when its answer is written."""
        with self._budget.share() as share:
            admission = Admission(share)
            try:
                yield admission
            finally:
                self._in_flight -= admission.counts

    async def answer(self, request: Request, admission: Admission, form: TypeAdapter[Any]) -> tuple[Any, str]:
        """Answer a request, as JSON values. Return the fingerprint of the model, too.

        Args:
            admission: result of `admission`, which is closed when the answer is written.
            form: the form of the request's body.

        Raises:
            HTTPException: 408, 413, 415, 422, 429, 500, 503, or 499 if the client closes the connection.
        """
        try:
            return await self._answer(request, admission, form)
        except asyncio.CancelledError as error:  # uvicorn cancels requests when the time of its shutdown is over
            raise HTTPException(503, "the server is shutting down; try again later", RETRY_AFTER | CLOSE) from error

    async def _answer(self, request: Request, admission: Admission, form: TypeAdapter[Any]) -> tuple[Any, str]:
        arrived = time.monotonic()
        self._ready()
        self._refuse_more_than(self.limits.requests)
        body = await read_body(request, admission.share, self.limits)
        self._refuse_more_than(self.limits.requests)
        self._in_flight += 1
        admission.counts = True
        answering = self._answer_body(body, admission.share, form, arrived)
        del body  # it is as large as its texts
        return await unless_disconnected(request, answering)

    def _refuse_more_than(self, requests: int) -> None:
        if self._in_flight >= requests:
            raise HTTPException(429, f"{self._in_flight} requests are being served; try again later", RETRY_AFTER)

    async def _answer_body(
        self, body: bytes, share: Share, form: TypeAdapter[Asked], arrived: float
    ) -> tuple[Any, str]:
        try:
            with span("parse", bytes=len(body)):
                asked = await self._parsers.run(parse, body, form, self.limits.documents)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        del body
        self._note_unknown(asked)
        share.hold(asked.held_bytes)
        scorer = self._ready()
        with scorer.used():
            return asked.answer(await self.score(scorer, asked, share, arrived)), scorer.fingerprint

    def _note_unknown(self, asked: Asked) -> None:
        """Log the names of unknown fields, each once."""
        new = asked.unknown_fields - self._unknown_fields
        if new and len(self._unknown_fields) < MAX_LOGGED_NAMES:
            self._unknown_fields |= new
            logger.warning("requests have fields that are unknown and do nothing: %s", sorted(new))

    async def score(self, scorer: Scorer, asked: Asked, share: Share, arrived: float) -> RequestScores:
        """Score the documents of a request, in batches with documents of other requests.

        Args:
            scorer: the scorer, in use.
            share: memory of the request. The request drops its texts when they are tokenised.
            arrived: time of the request's arrival, as a value of `time.monotonic`.

        Raises:
            HTTPException: 422 if the request does not fit the model, 503 if it does not fit into memory, 500 if the
                model fails.
        """
        degraded, scale, tasks = await self._prepare(scorer, asked, arrived)
        asked.drop_texts()
        tokens = sum(task.all_tokens for task in tasks)
        pairs = sum(len(task.pairs) for task in tasks)
        states = sum(task.state_bytes for task in tasks)
        share.hold(asked.held_bytes + 4 * tokens + BYTES_OF_A_PAIR * pairs + states)
        if degraded:
            self.metrics.degraded()
        deadlines = sum(task.end is not None for task in tasks)
        scorer.deadlines += deadlines
        try:
            found = await asyncio.gather(*(self._compute(scorer, task) for task in tasks))
        finally:
            scorer.deadlines -= deadlines
        operations = None
        if asked.counts_operations:
            counted = map(scorer.count_operations, tasks, found)
            operations = await self._tokenizers.run(sum, counted)
        # A query without documents may have no first-stage scores beside others that do.
        fusion = next((task.fusion for task in tasks if task.fusion is not None), None)
        return RequestScores(
            [task.hits(own) for task, own in zip(tasks, found, strict=True)],
            tokens,
            self.name,
            scale,
            tasks[0].setting.depth,
            asked.min_score,
            operations,
            None if fusion is None else fusion.weight,
            is_raw=asked.normalizer["normalize"] is False,
        )

    async def _prepare(self, scorer: Scorer, asked: Asked, arrived: float) -> tuple[bool, Scale, list[Task]]:
        """Tokenise the queries of a request.

        Returns:
            whether the request is answered at `degrade_to`, the function that makes the scores of the answer of raw
            ones, and a task for each query.

        Raises:
            HTTPException: 422 if the request does not fit the model.
        """
        end = None if asked.deadline_ms is None else arrived + asked.deadline_ms / 1000
        tasks: list[Task] = []
        pairs = 0
        try:
            degraded = self._degrades(scorer, asked)
            setting = asked.setting | ({"cutoff_layers": self.limits.degrade_to} if degraded else {})
            with span("tokenise"):
                for query in asked.lists:
                    prepare = partial(_prepare, scorer, asked, query, setting, self.limits.documents, pairs)
                    scale, task = await self._tokenizers.run(prepare)
                    pairs += len(task.pairs)
                    tasks.append(replace(task, end=end, shows_exit=degraded))
        except (TypeError, ValueError) as error:
            raise HTTPException(422, str(error)) from error
        return degraded, scale, tasks

    def _degrades(self, scorer: Scorer, asked: Asked) -> bool:
        """Return whether a request is answered at `degrade_to`. Raises as `MatryoshkaReranker.setting`."""
        exit, others = self.limits.degrade_to, self._in_flight - 1
        if exit is None or asked.fixes_depth or others <= DEGRADE_ABOVE * self.limits.requests:
            return False
        return is_shallower(exit, scorer.reranker.setting(**asked.setting))

    async def _compute(self, scorer: Scorer, task: Task) -> Sequence[Hit]:
        """Return the hit of each pair. Scores in the cache, which has none of stored passages, are not computed."""
        if self._cache is None or not task.divisible or task.is_stored:
            return await self._submit(scorer, task)
        keys = await self._tokenizers.run(score_keys, scorer.fingerprint, task.setting, task.pairs)
        known = self._cache.find(keys)
        missing = [number for number, score in enumerate(known) if score is None]
        found = [hit["score"] for hit in await self._submit(scorer, task.of_pairs(missing))]
        self._cache.store([keys[number] for number in missing], found)
        computed = iter(found)
        return task.plain_hits([next(computed) if score is None else score for score in known])

    async def _submit(self, scorer: Scorer, task: Task) -> Sequence[Hit]:
        """Compute the hit of each pair in batches with those of other requests.

        Raises:
            HTTPException: 503 if the request does not fit into memory, 500 if the model fails.
        """
        try:
            end = math.inf if task.end is None else task.end
            of_task = ((scorer, task.key), task.items, task.shared_tokens, task.tokens, task.divisible, end)
            with span("compute", documents=len(task.pairs), tokens=task.all_tokens), queue_span() as started:
                return await self._batcher.submit(*of_task, started)
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
            HTTPException: 503 if the model is not loaded, or fails, or requests wait too long for their tokens.
        """
        scorer = self._ready()
        for threads, work in ((self._parsers, "parsed"), (self._tokenizers, "tokenised")):
            if (seconds := threads.seconds_of_oldest) > STUCK_SECONDS:
                raise HTTPException(503, f"a request has waited {seconds:.0f} seconds to be {work}", RETRY_AFTER)
        if self._batcher.failing:
            try:
                task = scorer.prepare("query", ["document"], {}, Lengths(), max_pairs=1, others=0)
                with scorer.used():
                    await self._batcher.submit((scorer, task.key), task.pairs, task.shared_tokens, task.tokens)
            except Exception as error:
                raise HTTPException(503, "the model fails", RETRY_AFTER) from error


@dataclass(eq=False)
class Admission:
    """A request that is being served.

    Attributes:
        share: the memory that it holds.
        counts: whether it counts as one of `Limits.requests`.
    """

    share: Share
    counts: bool = False


def _compute(key: tuple[Scorer, Any], items: list[Sequence[Any]], between: Callable[[], None]) -> list[list[Hit]]:
    """Compute tasks of one scorer, as `Scorer.compute`."""
    scorer, of_task = key
    return scorer.compute(of_task, items, between)


def _prepare(
    scorer: Scorer, asked: Asked, query: QueryDocuments, setting: Mapping[str, Any], max_pairs: int, others: int
) -> tuple[Scale, Task]:
    """Tokenise one query of a request with its documents. Return the scale of its scores, too.

    Raises:
        ValueError: naming the query if there are several, as `Scorer.scale`, `Scorer.fusion` and `Scorer.prepare`.
    """
    try:
        setting = scorer.with_store(setting, query.documents)
        scale = scorer.scale(setting, asked.normalizer, asked.deadline_ms, query.instruction)
        fusion = scorer.fusion(asked.fusion, query.first_stage)
        of_task = (query.query, query.documents, setting, asked.lengths, max_pairs, others, asked.chunks)
        return scale, scorer.prepare(*of_task, query.instruction, fusion)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error}" if query.place is None else f"{query.place}: {error}") from error


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
