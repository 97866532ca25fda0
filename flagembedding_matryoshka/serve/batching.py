"""Dynamic batching: requests that arrive while the model computes go together into its next batch."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from time import perf_counter
from typing import Any


@dataclass(eq=False)
class Job:
    """One request.

    Attributes:
        key: jobs of equal keys may share a batch.
        items: what to compute a result for, each.
        shared_tokens: what the job costs in a batch beside its items.
        tokens: what each item costs.
        divisible: whether its items may be computed in several batches.
        future: takes the results of all items, or the error.
        results: of the items computed so far.
    """

    key: Hashable
    items: Sequence[Any]
    shared_tokens: int
    tokens: Sequence[int]
    divisible: bool
    future: asyncio.Future[list[Any]]
    results: list[Any] = field(default_factory=list)

    def fitting(self, room: int) -> int:
        """How many of the items that are left fit into `room` tokens; all or none where they must not be divided."""
        left = self.tokens[len(self.results) :]
        count = bisect_right(list(accumulate(left)), room - self.shared_tokens)
        return count if self.divisible or count == len(left) else 0

    def share(self, count: int) -> Share:
        """The next `count` items."""
        start = len(self.results)
        tokens = self.shared_tokens + sum(self.tokens[start : start + count])
        return Share(self, self.items[start : start + count], tokens)


@dataclass(frozen=True)
class Share:
    """The part of a job that one batch computes, and its tokens."""

    job: Job
    items: Sequence[Any]
    tokens: int


@dataclass(frozen=True)
class BatchReport:
    """What one call of the model computed, and how long it took."""

    requests: int
    items: int
    tokens: int
    seconds: float


class Abandoned(Exception):
    """Nobody waits for what is being computed."""


class Batcher:
    """Puts jobs together for `compute`, which has one batch at a time; an asynchronous context manager.

    The oldest job opens a batch; jobs of its key follow in the order they came, until the tokens are used up. A job
    that is larger than a batch gets one batch and then stands behind all others that wait, so that nobody waits longer
    than one batch for each job in front. One that must not be divided lets a batch of others through whenever it is
    between two steps. Nothing waits for a batch to fill up.

    Args:
        compute: (key, items of each job, between) to results of each job's items, in order. It calls `between` where it
            can be interrupted: others are computed meanwhile, in another thread, and it raises `Abandoned` if nobody
            waits any more.
        max_tokens: of a batch, at most, unless a single item, or a job that is not divisible, has more.
        max_jobs: in a batch, at most; None is any number.
        report: called after each computation that succeeded.
    """

    def __init__(
        self,
        compute: Callable[[Any, list[Sequence[Any]], Callable[[], None]], list[list[Any]]],
        max_tokens: int,
        max_jobs: int | None = None,
        report: Callable[[BatchReport], None] = lambda report: None,
    ) -> None:
        self._compute = compute
        self._max_tokens = max_tokens
        self._max_jobs = max_jobs
        self._report = report
        self._waiting: list[Job] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._thread_between = ThreadPoolExecutor(1, thread_name_prefix="model, between")
        self.failing = False
        """Whether the last computation failed."""

    async def __aenter__(self) -> Batcher:
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Stop after the batch, or the step, that is computed now; jobs that still wait are cancelled."""
        self._worker.cancel()
        for job in self._waiting:
            job.future.cancel()
        for thread in (self._thread, self._thread_between):
            await asyncio.to_thread(thread.shutdown)

    @property
    def waiting(self) -> int:
        """Jobs that are not finished."""
        return sum(not job.future.done() for job in self._waiting)

    async def submit(
        self, key: Hashable, items: Sequence[Any], shared_tokens: int, tokens: Sequence[int], divisible: bool = True
    ) -> list[Any]:
        """Results of `items`. Who is cancelled while waiting leaves the queue.

        Raises: what `compute` raised on this job's items.
        """
        if not items:
            return []
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append(Job(key, items, shared_tokens, tokens, divisible, future))
        self._arrived.set()
        return await future

    async def _work(self) -> None:
        while True:
            self._waiting = [job for job in self._waiting if not job.future.done()]
            if not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            await self._serve(self._waiting, self._thread)

    async def _serve(self, jobs: list[Job], thread: ThreadPoolExecutor) -> None:
        """Compute a batch of these."""
        first, *others = self._next_batch(jobs)
        await self._run([first, *others], thread)
        if not first.job.future.done():
            self._waiting.remove(first.job)
            self._waiting.append(first.job)

    async def _let_others_through(self, batch: list[Share]) -> None:
        """Compute a batch of those that can be divided, if any wait, while `batch` does not go on.

        Raises:
            Abandoned: if nobody waits for `batch`.
        """
        if all(share.job.future.done() for share in batch):
            raise Abandoned
        if others := [job for job in self._waiting if job.divisible and not job.future.done()]:
            await self._serve(others, self._thread_between)

    def _next_batch(self, jobs: list[Job]) -> list[Share]:
        first = jobs[0]
        smallest = 1 if first.divisible else len(first.items)
        batch = [first.share(max(first.fitting(self._max_tokens), smallest))]
        room = self._max_tokens - batch[0].tokens
        for job in jobs[1:]:
            if len(batch) == self._max_jobs:
                break
            if job.key != first.key:
                continue
            count = job.fitting(room)
            if not count:
                break
            batch.append(job.share(count))
            room -= batch[-1].tokens
        return batch

    async def _run(self, batch: list[Share], thread: ThreadPoolExecutor) -> None:
        """Compute a batch; if that fails, each of its shares alone, so that only those that fail alone do."""
        loop, start, waited = asyncio.get_running_loop(), perf_counter(), 0.0

        def between() -> None:
            nonlocal waited
            if not batch[0].job.divisible:
                pause = perf_counter()
                asyncio.run_coroutine_threadsafe(self._let_others_through(batch), loop).result()
                waited += perf_counter() - pause

        try:
            found = await loop.run_in_executor(
                thread, self._compute, batch[0].job.key, [share.items for share in batch], between
            )
        except Abandoned:
            return
        except Exception as error:
            self.failing = True
            if len(batch) == 1:
                if not batch[0].job.future.done():
                    batch[0].job.future.set_exception(error)
                return
            for share in batch:
                await self._run([share], thread)
            return
        self.failing = False
        self._report(
            BatchReport(
                requests=len(batch),
                items=sum(len(share.items) for share in batch),
                tokens=sum(share.tokens for share in batch),
                seconds=perf_counter() - start - waited,
            )
        )
        for share, results in zip(batch, found, strict=True):
            job = share.job
            job.results.extend(results)
            if len(job.results) == len(job.items) and not job.future.done():
                job.future.set_result(job.results)
