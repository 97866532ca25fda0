"""A process for each device, all over one copy of the weights."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import shutil
import signal
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from flagembedding_matryoshka.inference.engine import Engine, Task
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM

SHARED_MEMORY = Path("/dev/shm")
SECONDS_TO_LEAVE = 5.0
logger = logging.getLogger(__name__)


class RemoteTraceback(Exception):
    """Where in a worker its exception was raised."""


class TaskFailed(Exception):
    """A worker has raised `error`, and lives.

    Attributes:
        error: what it raised; its cause holds the worker's traceback.
    """

    def __init__(self, error: Exception, where: str) -> None:
        super().__init__(error, where)
        self.error = error
        error.__cause__ = RemoteTraceback(where)


@dataclass(eq=False)
class Worker:
    """The parent's side of a process.

    Attributes:
        loaded: whether it has the model.
        ready: whether it has that and has answered all that it was sent.
        task: number of the task that it computes.
        forgotten: whether nobody waits for the answer that it owes.
    """

    device: str
    process: SpawnProcess
    connection: Connection
    loaded: bool = False
    ready: bool = False
    task: int | None = None
    forgotten: bool = False

    def forget(self) -> None:
        """Go on computing; the answer will be thrown away."""
        self.forgotten = self.task is not None
        self.task = None

    def end(self) -> int | None:
        """Its exit code, once it has left by itself or been killed."""
        self.connection.close()
        self.process.join(SECONDS_TO_LEAVE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode


class WorkerPool:
    """Runs tasks on several devices, each with a process of its own that starts with the first task.

    The model's weights move to shared memory, where workers on CPUs use them in place; others copy them to their
    device. CPU workers divide this process's threads among themselves. A worker ends when its pool is closed or this
    process is gone, however that came.

    Args:
        devices: may name one several times.
        compile: see `Engine`.
    """

    def __init__(self, model: CostWiseForCausalLM, devices: Sequence[str], compile: bool = False) -> None:
        self._model = model
        self._compile = compile
        self._devices = list(devices)
        self._workers: list[Worker] = []
        self._lock = threading.Lock()

    def run(self, tasks: Iterable[Task], device: str | None = None) -> Generator[tuple[int, Any], None, None]:
        """(number, result) of each task, as they finish; a worker that is free takes the next.

        Calls from several threads take turns. Workers outlive what their tasks raise; what is not consumed to its end,
        or interrupted, stops them at once.

        Args:
            device: None is all of them.

        Raises:
            RuntimeError: if workers died and none is left to do their tasks, or one task killed two.
            Exception: what a worker raised; its cause holds the worker's traceback.
        """
        with self._lock:
            self._start()
            try:
                yield from self._run(tasks, [worker for worker in self._workers if device in (None, worker.device)])
            except TaskFailed as failed:
                for worker in self._workers:
                    worker.forget()
                raise failed.error from failed.error.__cause__
            except BaseException:
                self._stop(kill=True)
                raise

    def _run(self, tasks: Iterable[Task], workers: list[Worker]) -> Generator[tuple[int, Any], None, None]:
        source = enumerate(tasks)
        upcoming = next(source, None)
        returned: deque[tuple[int, Task]] = deque()
        given: dict[int, Task] = {}
        deaths: dict[int, str] = {}
        while upcoming or returned or given:
            for worker in [worker for worker in workers if worker.ready]:
                if returned:
                    following = returned.popleft()
                elif upcoming:
                    following, upcoming = upcoming, next(source, None)
                else:
                    break
                worker.task, worker.ready = following[0], False
                given[worker.task] = following[1]
                _send(worker, following[1])
            for connection in wait([worker.connection for worker in workers if not worker.ready]):
                worker = next(worker for worker in workers if worker.connection is connection)
                try:
                    result, error = worker.connection.recv()
                except (EOFError, OSError):
                    workers.remove(worker)
                    report = self._bury(worker)
                    if (number := worker.task) is not None:
                        if number in deaths:
                            raise RuntimeError(
                                f"a batch killed two workers: {deaths[number]}, {report}. A lower "
                                "max_tokens_per_batch may help."
                            ) from None
                        deaths[number] = report
                        returned.append((number, given.pop(number)))
                    if not workers:
                        raise RuntimeError(f"no worker is left; the last was {report}.") from None
                    logger.warning("A worker is lost, the others go on with its work: %s.", report)
                    continue
                failed = error and TaskFailed(error[0], f"in the worker of {worker.device}\n{error[1]}")
                if failed and not worker.loaded:
                    raise failed.error
                number, is_awaited = worker.task, worker.loaded and not worker.forgotten
                worker.loaded = worker.ready = True
                worker.task, worker.forgotten = None, False
                if is_awaited and failed:
                    raise failed
                if is_awaited and number is not None:
                    del given[number]
                    yield number, result

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
        on_cpu = sum(torch.device(device).type == "cpu" for device in self._devices)
        threads = max(1, torch.get_num_threads() // max(1, on_cpu))
        for device in missing:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(theirs, self._model, device, threads, self._compile),
                name=f"worker {device}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._workers.append(Worker(device, process, ours))

    def _share_weights(self) -> None:
        tensors = [*self._model.parameters(), *self._model.buffers()]
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors if not tensor.is_shared())
        if SHARED_MEMORY.exists() and needed > (free := shutil.disk_usage(SHARED_MEMORY).free):
            raise RuntimeError(
                f"several devices share the weights through {SHARED_MEMORY}, where {free >> 20} MiB are free and "
                f"{needed >> 20} are needed; Docker sets its size with --shm-size."
            )
        self._model.share_memory()

    def _bury(self, worker: Worker) -> str:
        self._workers.remove(worker)
        return f"that of {worker.device}, which died with exit code {worker.end()}"

    def _stop(self, kill: bool) -> None:
        for worker in self._workers:
            if kill:
                worker.process.kill()
            worker.connection.close()
        for worker in self._workers:
            worker.end()
        self._workers = []


def _send(worker: Worker, task: Task) -> None:
    with suppress(OSError):  # it is dead, which reading from it tells
        worker.connection.send(task)


def _work(connection: Connection, model: CostWiseForCausalLM, device: str, threads: int, compile: bool) -> None:
    """What a worker does until the other end of `connection` is closed: answer (result, None) or (None, error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    with suppress(EOFError, ConnectionError):  # closed, or its owner is gone
        try:
            engine = Engine(model.to(device), compile)  # type: ignore[arg-type]
        except Exception as error:
            connection.send((None, _portable(error)))
            return
        connection.send((None, None))
        while True:
            task: Task = connection.recv()
            try:
                answer: tuple[Any, Any] = task.start(engine)(), None
            except Exception as error:
                answer = None, _portable(error)
            connection.send(answer)


def _portable(error: Exception) -> tuple[Exception, str]:
    """An exception that survives the way to another process, and its traceback."""
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error)), text
    return error, text
