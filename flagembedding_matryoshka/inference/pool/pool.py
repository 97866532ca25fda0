"""A worker process for each device, all with one copy of the weights."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from weakref import WeakSet

import torch

from flagembedding_matryoshka.inference.device import threads_of_each
from flagembedding_matryoshka.inference.engine import Task, TaskScores
from flagembedding_matryoshka.inference.pool.process import work
from flagembedding_matryoshka.inference.pool.worker import Assignment, RunError, Worker
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM

SHARED_MEMORY = Path("/dev/shm")
TASKS_AHEAD = 2
"""Tasks that a worker on a GPU has beside the one whose results it waits for. One is queued on the device, and one is
started as soon as these results are there."""
logger = logging.getLogger(__name__)


class WorkerPool:
    """Runs tasks on several devices, each with a process of its own that starts with the first task.

    The model's weights move to shared memory, where workers on CPUs use them in place; others copy them to their
    device. CPU workers divide this process's threads among themselves. A worker ends when its pool is closed or when
    this process ends in any way. After `fork` the child's pool has no workers: its first task starts its own ones.

    Args:
        devices: one worker for each; a device may be named several times.
        compile: see `Engine`.
    """

    def __init__(self, model: CostWiseForCausalLM, devices: Sequence[str], compile: bool = False) -> None:
        self._model = model
        self._compile = compile
        self._devices = list(devices)
        self._workers: list[Worker] = []
        self._last_death = ""
        self._lock = threading.Lock()
        _POOLS.add(self)

    def run(
        self, tasks: Iterable[Task], device: str | None = None, between_batches: Callable[[], None] | None = None
    ) -> Generator[tuple[Task, TaskScores], None, None]:
        """Yield each task with its results, as they finish. A free worker takes the next task.

        A worker on a GPU is given TASKS_AHEAD more, unless `between_batches` is given.

        Calls from several threads take turns, call after call or between the batches of a cascade. Exceptions of tasks
        and of `between_batches` leave the workers alive. If the generator is closed early, or interrupted, the workers
        are killed.

        Args:
            device: the device to use; None is all devices.
            between_batches: as in `Engine.start`, called in the thread of the run. Meanwhile other threads can use the
                workers.

        Raises:
            RuntimeError: if workers died and none is left to do their tasks, or one task killed two.
            Exception: the exception of `between_batches` or of a worker, whose traceback is then its cause.
        """
        given: list[Assignment] = []
        with self._lock:
            self._start()
            try:
                yield from self._run(tasks, device, between_batches, given)
            except RunError as ended:
                for assignment in given:
                    assignment.is_abandoned = True
                for worker in self._workers:
                    if worker.is_between(given):
                        worker.resume()
                raise ended.error from ended.error.__cause__
            except BaseException:
                self._stop(kill=True)
                raise

    def _run(
        self,
        tasks: Iterable[Task],
        device: str | None,
        between: Callable[[], None] | None,
        given: list[Assignment],
    ) -> Generator[tuple[Task, TaskScores], None, None]:
        source = enumerate(tasks)
        upcoming = next(source, None)
        returned: deque[tuple[int, Task]] = deque()
        deaths: dict[int, str] = {}
        while True:
            for worker in self._workers[:]:
                if between is not None and worker.is_between(given):
                    self._call_without_lock(between)
                    if worker in self._workers and worker.is_between(given):
                        worker.resume()
            for assignment in given[:]:
                if assignment.death is not None:
                    given.remove(assignment)
                    returned.append((assignment.number, assignment.task))
                    if not assignment.is_ahead:
                        _refuse_second(deaths, assignment)
                elif assignment.answer is not None:
                    given.remove(assignment)
                    if assignment.answer.error is not None:
                        raise RunError(assignment.answer.error)
                    yield assignment.task, assignment.answer.result
            if not (upcoming or returned or given):
                return
            workers = [worker for worker in self._workers if device in (None, worker.device)]
            if not workers:
                raise RuntimeError(f"no worker is left; the last was {self._last_death}.")
            while returned or upcoming:
                free = [worker for worker in workers if worker.ready and not worker.is_between(given)]
                busy = [] if between else [worker for worker in workers if worker.takes_ahead(given)]
                if not free and not busy:
                    break
                if returned:
                    following = returned.popleft()
                else:
                    assert upcoming is not None
                    following, upcoming = upcoming, next(source, None)
                given.append(Assignment(*following))
                if free:
                    free[0].give(given[-1], pauses=between is not None)
                else:
                    min(busy, key=lambda worker: len(worker.ahead)).give_ahead(given[-1])
            # While `between` ran, another call may have received a pause.
            if between is None or not any(worker.is_between(given) for worker in self._workers):
                self._hear([worker for worker in workers if not worker.ready])

    def _hear(self, workers: Sequence[Worker]) -> None:
        """Receive the messages of these workers; wait for the first one."""
        for connection in wait([worker.connection for worker in workers]):
            worker = next(worker for worker in workers if worker.connection is connection)
            try:
                worker.read()
            except (EOFError, OSError):
                self._bury(worker)
                logger.warning("A worker is lost, the others go on with its work: %s.", self._last_death)
            except RunError:
                self._bury(worker)
                raise

    def _call_without_lock(self, between: Callable[[], None]) -> None:
        self._lock.release()
        try:
            between()
        except Exception as error:
            raise RunError(error) from None
        finally:
            self._lock.acquire()

    def _bury(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self._last_death = f"that of {worker.device}, which died with exit code {worker.end()}"
        for assignment in (*worker.assignments, *worker.ahead):
            assignment.death = self._last_death

    def close(self) -> None:
        """End the workers; the next task starts new ones."""
        with self._lock:
            self._stop(kill=False)

    def _start(self) -> None:
        missing = list(self._devices)
        for worker in self._workers:
            missing.remove(worker.device)
        if not missing:
            return
        if multiprocessing.current_process().daemon:
            raise RuntimeError(
                f"several devices, {self._devices}, take a process each, which a daemonic process such as "
                f"{multiprocessing.current_process().name} may not start. Use one device here, or daemon=False there."
            )
        self._share_weights()
        context = multiprocessing.get_context("spawn")
        threads = threads_of_each(self._devices)
        for device in missing:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=work,
                args=(theirs, self._model, device, threads, self._compile),
                name=f"worker {device}",
                daemon=True,
            )
            with _blocked_interrupts():
                process.start()
            theirs.close()
            room = TASKS_AHEAD if torch.device(device).type == "cuda" else 0
            self._workers.append(Worker(device, process, ours, room=room))

    def _share_weights(self) -> None:
        tensors = [*self._model.parameters(), *self._model.buffers()]
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors if not tensor.is_shared())
        if SHARED_MEMORY.exists() and needed > (free := shutil.disk_usage(SHARED_MEMORY).free):
            raise RuntimeError(
                f"several devices share the weights through {SHARED_MEMORY}, where {free >> 20} MiB are free and "
                f"{needed >> 20} are needed; Docker sets its size with --shm-size."
            )
        self._model.share_memory()

    def forget_workers(self) -> None:
        """Drop the parent's workers in a child process that `fork` made. The parent goes on with them."""
        for worker in self._workers:
            worker.connection.close()
            # At its end the child would terminate all processes in this set.
            multiprocessing.process._children.discard(worker.process)  # type: ignore[attr-defined]
        self._workers, self._last_death = [], ""
        self._lock = threading.Lock()  # another thread of the parent may hold the old one

    def _stop(self, kill: bool) -> None:
        for worker in self._workers:
            if kill:
                worker.process.kill()
            worker.connection.close()
        for worker in self._workers[:]:
            self._bury(worker)


_POOLS: WeakSet[WorkerPool] = WeakSet()


def _forget_workers() -> None:
    for pool in _POOLS:
        pool.forget_workers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def _refuse_second(deaths: dict[int, str], assignment: Assignment) -> None:
    """Raise RuntimeError if this task has killed a worker before."""
    assert assignment.death is not None
    if assignment.number in deaths:
        raise RuntimeError(
            f"a batch killed two workers: {deaths[assignment.number]}, {assignment.death}. A lower "
            "max_tokens_per_batch may help."
        )
    deaths[assignment.number] = assignment.death


@contextmanager
def _blocked_interrupts() -> Iterator[None]:
    """Let processes that start inside never receive SIGINT, not even while they import.

    Ctrl-C in a terminal sends it to all processes, but this one ends its workers. Windows has no such mask.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # when it starts, it clears the mask
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
