"""Dynamic batching: tasks of requests that arrive while the model computes share its next batch."""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from time import perf_counter
from typing import Any

MAX_INTERRUPTED = 8
"""Most tasks that are interrupted at one time. Each holds the states of its candidates."""


@dataclass(eq=False)
class QueuedTask:
    """A task in the queue.

    Attributes:
        key: tasks with equal keys may share a batch.
        items: inputs of `compute`, each with one result.
        shared_tokens: tokens that the task adds to a batch once, whatever the number of its items.
        tokens: tokens of each item.
        divisible: whether its items may be computed in several batches.
        end: the deadline; math.inf is no deadline.
        started: called when its first batch is computed next.
        future: future of the results of all items.
        arrived: time of its arrival, as a value of `time.perf_counter`.
        results: results of the items computed so far.
        is_interrupted: whether it is between two of its steps, while others are computed.
    """

    key: Hashable
    items: Sequence[Any]
    shared_tokens: int
    tokens: Sequence[int]
    divisible: bool
    end: float
    started: Callable[[], None]
    future: asyncio.Future[list[Any]]
    arrived: float = field(default_factory=perf_counter)
    results: list[Any] = field(default_factory=list)
    is_interrupted: bool = False

    @property
    def waits(self) -> bool:
        """Whether a batch can take it."""
        return not self.is_interrupted and not self.future.done()

    @property
    def all_tokens(self) -> int:
        """Number of tokens of all items."""
        return self.shared_tokens + sum(self.tokens)

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
    """Numbers of one call of the model.

    Attributes:
        requests: number of queries.
        items: number of documents.
        queued: seconds that each query waited whose first batch this is.
    """

    requests: int
    items: int
    tokens: int
    seconds: float
    queued: Sequence[float]


class ClientsGone(Exception):
    """All clients of the running computation have left."""


class Batcher:
    """Run `compute` on batches of tasks, one batch at a time. An asynchronous context manager.

    Tasks take turns. A turn computes all waiting tasks with a deadline, the earliest deadline first, and then one batch
    of other tasks. The oldest task opens this batch. Tasks with the same key follow in order of arrival, as long as
    their tokens fit. No batch waits for further tasks. A task that is larger than a batch gets one batch in a turn, and
    then moves to the end of the queue.

    A task that is not divisible, which is a cascade or has a deadline, runs in steps. Before each step other tasks get
    a turn: those with an earlier deadline, and one batch. A task that is not divisible is in this batch only if it is
    small: if a cascade is interrupted, at most half of the tokens that this cascade has left; if a task with a deadline
    is interrupted, at most the tokens of one batch. Before the first step of a task with a deadline there is no batch:
    it has waited for one.

    Args:
        compute: (key, items of each task, between) to results of each task's items, in order. It calls `between` where
            it can be interrupted. `between` computes other tasks in another thread, or raises `ClientsGone` if all
            clients have left.
        max_tokens: most tokens of a batch, unless a single item, or a task that is not divisible, has more. It may
            change between two batches.
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
        self.max_tokens = max_tokens
        self._max_tasks = max_tasks
        self._report = report
        self._waiting: list[QueuedTask] = []
        self._arrived = asyncio.Event()
        self._threads = [ThreadPoolExecutor(1, f"model, level {level}") for level in range(MAX_INTERRUPTED + 1)]
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
        for thread in self._threads:
            await asyncio.to_thread(thread.shutdown)

    async def submit(
        self,
        key: Hashable,
        items: Sequence[Any],
        shared_tokens: int,
        tokens: Sequence[int],
        divisible: bool = True,
        end: float = math.inf,
        started: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """Compute the results of `items`. Cancel the call to leave the queue. Arguments as in `QueuedTask`.

        Raises: the error of `compute` on this task's items.
        """
        if not items:
            return []
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append(QueuedTask(key, items, shared_tokens, tokens, divisible, end, started, future))
        self._arrived.set()
        return await future

    async def _work(self) -> None:
        while True:
            self._waiting = [task for task in self._waiting if not task.future.done()]
            if not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            await self._take_turn(0)

    async def _take_turn(self, level: int, end: float = math.inf, most: float = math.inf) -> None:
        """Compute tasks that wait: those with a deadline, then one batch of the others.

        Args:
            level: number of interrupted batches.
            end: deadlines that are not earlier wait.
            most: tasks that are not divisible and have more tokens wait. With -math.inf all tasks without a
                deadline wait.
        """
        if level == MAX_INTERRUPTED:
            end, most = -math.inf, min(most, 0)
        for task in sorted((task for task in self._waiting if task.end < end), key=lambda task: task.end):
            if task.waits:
                await self._serve([task], level)
        others = [task for task in self._waiting if task.waits and task.end == math.inf and most > -math.inf]
        if fitting := [task for task in others if task.divisible or task.all_tokens <= most]:
            await self._serve(fitting, level)

    async def _serve(self, tasks: list[QueuedTask], level: int) -> None:
        """Compute the next batch of these tasks. If its first task is not finished, move it to the end of the queue."""
        first, *others = self._next_batch(tasks)
        await self._run([first, *others], level)
        if not first.task.future.done():
            self._waiting.remove(first.task)
            self._waiting.append(first.task)

    async def _let_others_through(self, batch: list[TaskSlice], steps: int, level: int) -> None:
        """Take a turn while `batch` is interrupted.

        Args:
            steps: number of steps of the batch that have been computed.
            level: number of batches that are interrupted by `batch`.

        Raises:
            ClientsGone: if all clients of `batch` have left.
        """
        if all(slice.task.future.done() for slice in batch):
            raise ClientsGone
        end = batch[0].task.end
        # An estimate: in its first stage, which has most tokens, a cascade computes one batch in a step.
        left = sum(slice.tokens for slice in batch) - steps * self.max_tokens
        most_of_deadline = self.max_tokens if steps else -math.inf
        for slice in batch:
            slice.task.is_interrupted = True
        try:
            await self._take_turn(level + 1, end, left / 2 if end == math.inf else most_of_deadline)
        finally:
            for slice in batch:
                slice.task.is_interrupted = False

    def _next_batch(self, tasks: list[QueuedTask]) -> list[TaskSlice]:
        first = tasks[0]
        smallest = 1 if first.divisible else len(first.items)
        batch = [first.next_slice(max(first.fitting(self.max_tokens), smallest))]
        room = self.max_tokens - batch[0].tokens
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

    async def _run(self, batch: list[TaskSlice], level: int) -> None:
        """Compute a batch. If that fails, compute each of its slices alone, so that the others' clients get results."""
        loop, start, waited, steps = asyncio.get_running_loop(), perf_counter(), 0.0, 0

        def between() -> None:
            nonlocal waited, steps
            if not batch[0].task.divisible:
                pause = perf_counter()
                asyncio.run_coroutine_threadsafe(self._let_others_through(batch, steps, level), loop).result()
                waited += perf_counter() - pause
                steps += 1

        for slice in batch:
            if not slice.task.results:
                slice.task.started()
        try:
            found = await loop.run_in_executor(
                self._threads[level], self._compute, batch[0].task.key, [slice.items for slice in batch], between
            )
        except ClientsGone:
            return
        except Exception as error:
            self.failing = True
            if len(batch) == 1:
                if not batch[0].task.future.done():
                    batch[0].task.future.set_exception(error)
                return
            for slice in batch:
                await self._run([slice], level)
            return
        self.failing = False
        self._report(
            BatchReport(
                requests=len(batch),
                items=sum(len(slice.items) for slice in batch),
                tokens=sum(slice.tokens for slice in batch),
                seconds=perf_counter() - start - waited,
                queued=[start - slice.task.arrived for slice in batch if not slice.task.results],
            )
        )
        for slice, results in zip(batch, found, strict=True):
            task = slice.task
            task.results.extend(results)
            if len(task.results) == len(task.items) and not task.future.done():
                task.future.set_result(task.results)
