"""The worker process: it computes tasks one after the other, also while a cascade pauses between two batches.

A GPU gets the next task before the results of the one before are read, if the parent has sent it.
"""

from __future__ import annotations

import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from flagembedding_matryoshka.inference.engine import Engine, Task, TaskScores
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM


class TaskMessage(NamedTuple):
    """A task, and whether it pauses between the batches of a cascade."""

    task: Task
    pauses: bool


class TaskAnswer(NamedTuple):
    """The answer to a task: its results, or an exception with its traceback."""

    result: Any = None
    error: Exception | None = None
    where: str = ""


class Control(Enum):
    """Messages beside tasks and answers."""

    PAUSE = auto()
    """From a worker: a task pauses between two batches. The worker takes tasks until GO_ON or STOP."""
    GO_ON = auto()
    STOP = auto()


class RunStop(Exception):
    """The run of the task has ended."""


def work(connection: Connection, model: CostWiseForCausalLM, device: str, threads: int, compile: bool) -> None:
    """Load the model, answer whether that worked, and answer tasks until the other end of `connection` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    with suppress(EOFError, ConnectionError):  # the parent closed it, or is gone
        try:
            engine = Engine(model.to(device), compile)  # type: ignore[arg-type]
        except Exception as error:
            connection.send(_failure(error))
            return
        connection.send(TaskAnswer())
        parent = ParentConnection(connection)
        while True:
            answer(parent, engine, parent.receive())


class ParentConnection:
    """The connection to the parent.

    A thread receives, so that the parent can always send: otherwise two full pipes would block both ends.
    """

    def __init__(self, connection: Connection) -> None:
        self.send = connection.send
        self._connection = connection
        self._received: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._receive, name="tasks", daemon=True).start()

    def _receive(self) -> None:
        try:
            while True:
                self._received.put(self._connection.recv())
        except (EOFError, OSError):
            pass
        finally:
            self._received.put(None)

    def has_received(self) -> bool:
        """Return whether a message waits to be read."""
        return not self._received.empty()

    def receive(self) -> Any:
        """Return the next message.

        Raises:
            EOFError: if the parent closed the connection.
        """
        received = self._received.get()
        if received is None:
            raise EOFError
        return received


def answer(parent: ParentConnection, engine: Engine, message: TaskMessage) -> None:
    """Answer a task, and the tasks that come before its answer.

    If a task waits, it is started before the results of the previous task are waited for.
    """
    started = deque([_start(parent, engine, message)])
    while started:
        if len(started) == 1 and parent.has_received():
            started.append(_start(parent, engine, parent.receive()))
        parent.send(started.popleft()())


def _start(parent: ParentConnection, engine: Engine, message: TaskMessage) -> Callable[[], TaskAnswer]:
    """Start a task, and return a callable that waits for its answer."""
    try:
        wait = engine.start(message.task, partial(_pause, parent, engine) if message.pauses else None)
    except Exception as error:
        failure = _failure(error)
        return lambda: failure
    return partial(_answer_of, wait)


def _answer_of(wait: Callable[[], TaskScores]) -> TaskAnswer:
    try:
        return TaskAnswer(wait())
    except Exception as error:
        return _failure(error)


def _pause(parent: ParentConnection, engine: Engine) -> None:
    parent.send(Control.PAUSE)
    while (heard := parent.receive()) is not Control.GO_ON:
        if heard is Control.STOP:
            raise RunStop
        answer(parent, engine, heard)


def _failure(error: Exception) -> TaskAnswer:
    """Return an answer with the exception, or with its text if it cannot be pickled."""
    where = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(repr(error))
    return TaskAnswer(error=error, where=where)
