"""Dynamic batching: tasks of requests that arrive while the model computes share its next batch."""

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
class QueuedTask:
    """A task in the queue.

    Attributes:
        key: tasks with equal keys may share a batch.
        items: inputs of `compute`, each with one result.
        shared_tokens: tokens that the task adds to a batch once, whatever the number of its items.
        tokens: tokens of each item.
        divisible: whether its items may be computed in several batches.
        future: future of the results of all items.
        results: results of the items computed so far.
    """

    key: Hashable
    items: Sequence[Any]
    shared_tokens: int
    tokens: Sequence[int]
    divisible: bool
    future: asyncio.Future[list[Any]]
    results: list[Any] = field(default_factory=list)

    def fitting(self, room: int) -> int:
        """Return how many of the remaining items fit into `room` tokens: all or none if the task is not divisible."""
        left = self.tokens[len(self.results) :]
        count = bisect_right(list(accumulate(left)), room - self.shared_tokens)
        return count if self.divisible or count == len(left) else 0

    def next_slice(self, count: int) -> TaskSlice:
        """Return the next `count` items."""
        start = len(self.results)
        tokens = self.shared_tokens + sum(self.tokens[start : start + count])
        return TaskSlice(self, self.items[start : start + count], tokens)


@dataclass(frozen=True)
class TaskSlice:
    """The items of a task that one batch computes, and the number of their tokens."""

    task: QueuedTask
    items: Sequence[Any]
    tokens: int


@dataclass(frozen=True)
class BatchReport:
    """Numbers of one call of the model."""

    requests: int
    items: int
    tokens: int
    seconds: float


class Abandoned(Exception):
    """All clients of the running computation have left."""


class Batcher:
    """Run `compute` on batches of tasks, one batch at a time. An asynchronous context manager.

    The oldest task opens a batch. Tasks with its key follow in order of arrival, until the tokens are used up. No batch
    waits to be filled. A task that is larger than a batch gets one batch and then moves to the end of the queue. A task
    that is not divisible lets one batch of divisible tasks pass between any two of its steps.

    Args:
        compute: (key, items of each task, between) to results of each task's items, in order. It calls `between` where
            it can be interrupted. `between` runs a batch of other tasks in another thread, or raises `Abandoned` if all
            clients have left.
        max_tokens: most tokens of a batch, unless a single item, or a task that is not divisible, has more.
        max_tasks: most tasks in a batch; None is no limit.
        report: called after each computation that succeeded.
    """

    def __init__(
        self,
        compute: Callable[[Any, list[Sequence[Any]], Callable[[], None]], list[list[Any]]],
        max_tokens: int,
        max_tasks: int | None = None,
        report: Callable[[BatchReport], None] = lambda report: None,
    ) -> None:
        self._compute = compute
        self._max_tokens = max_tokens
        self._max_tasks = max_tasks
        self._report = report
        self._waiting: list[QueuedTask] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._thread_between = ThreadPoolExecutor(1, thread_name_prefix="model, between")
        self.failing = False
        """Whether the last computation failed."""

    async def __aenter__(self) -> Batcher:
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Stop after the running batch or step. Cancel tasks that wait."""
        self._worker.cancel()
        for task in self._waiting:
            task.future.cancel()
        for thread in (self._thread, self._thread_between):
            await asyncio.to_thread(thread.shutdown)

    @property
    def waiting(self) -> int:
        """Number of tasks that are not finished."""
        return sum(not task.future.done() for task in self._waiting)

    async def submit(
        self, key: Hashable, items: Sequence[Any], shared_tokens: int, tokens: Sequence[int], divisible: bool = True
    ) -> list[Any]:
        """Compute the results of `items`. Cancel the call to leave the queue.

        Raises: the error of `compute` on this task's items.
        """
        if not items:
            return []
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append(QueuedTask(key, items, shared_tokens, tokens, divisible, future))
        self._arrived.set()
        return await future

    async def _work(self) -> None:
        while True:
            self._waiting = [task for task in self._waiting if not task.future.done()]
            if not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            await self._serve(self._waiting, self._thread)

    async def _serve(self, tasks: list[QueuedTask], thread: ThreadPoolExecutor) -> None:
        """Compute the next batch of these tasks. If its first task is not finished, move it to the end of the queue."""
        first, *others = self._next_batch(tasks)
        await self._run([first, *others], thread)
        if not first.task.future.done():
            self._waiting.remove(first.task)
            self._waiting.append(first.task)

    async def _let_others_through(self, batch: list[TaskSlice]) -> None:
        """Compute a batch of divisible tasks, if any wait, while `batch` is interrupted.

        Raises:
            Abandoned: if all clients of `batch` have left.
        """
        if all(slice.task.future.done() for slice in batch):
            raise Abandoned
        if others := [task for task in self._waiting if task.divisible and not task.future.done()]:
            await self._serve(others, self._thread_between)

    def _next_batch(self, tasks: list[QueuedTask]) -> list[TaskSlice]:
        first = tasks[0]
        smallest = 1 if first.divisible else len(first.items)
        batch = [first.next_slice(max(first.fitting(self._max_tokens), smallest))]
        room = self._max_tokens - batch[0].tokens
        for task in tasks[1:]:
            if len(batch) == self._max_tasks:
                break
            if task.key != first.key:
                continue
            count = task.fitting(room)
            if not count:
                break
            batch.append(task.next_slice(count))
            room -= batch[-1].tokens
        return batch

    async def _run(self, batch: list[TaskSlice], thread: ThreadPoolExecutor) -> None:
        """Compute a batch. If that fails, compute each of its slices alone, so that the others' clients get results."""
        loop, start, waited = asyncio.get_running_loop(), perf_counter(), 0.0

        def between() -> None:
            nonlocal waited
            if not batch[0].task.divisible:
                pause = perf_counter()
                asyncio.run_coroutine_threadsafe(self._let_others_through(batch), loop).result()
                waited += perf_counter() - pause

        try:
            found = await loop.run_in_executor(
                thread, self._compute, batch[0].task.key, [slice.items for slice in batch], between
            )
        except Abandoned:
            return
        except Exception as error:
            self.failing = True
            if len(batch) == 1:
                if not batch[0].task.future.done():
                    batch[0].task.future.set_exception(error)
                return
            for slice in batch:
                await self._run([slice], thread)
            return
        self.failing = False
        self._report(
            BatchReport(
                requests=len(batch),
                items=sum(len(slice.items) for slice in batch),
                tokens=sum(slice.tokens for slice in batch),
                seconds=perf_counter() - start - waited,
            )
        )
        for slice, results in zip(batch, found, strict=True):
            task = slice.task
            task.results.extend(results)
            if len(task.results) == len(task.items) and not task.future.done():
                task.future.set_result(task.results)
