"""What a worker process does: compute the tasks that it is given, one after the other, or in the midst of a cascade."""

from __future__ import annotations

import pickle
import signal
import traceback
from contextlib import suppress
from enum import Enum, auto
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from flagembedding_matryoshka.inference.engine import Engine, Task
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM


class Order(NamedTuple):
    """A task, and whether it pauses between the batches of a cascade."""

    task: Task
    pauses: bool


class Answer(NamedTuple):
    """What came of a task: a result, or an exception and where it was raised."""

    result: Any = None
    error: Exception | None = None
    where: str = ""


class Word(Enum):
    """What is said beside orders and answers."""

    PAUSE = auto()
    """A worker's: it is between two batches, and computes what it is ordered until it hears one of the others."""
    GO_ON = auto()
    STOP = auto()


class Stopped(Exception):
    """Nobody waits for the task that is computed."""


def work(connection: Connection, model: CostWiseForCausalLM, device: str, threads: int, compile: bool) -> None:
    """Answer orders until the other end of `connection` is closed; the first answer is about the model."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    with suppress(EOFError, ConnectionError):  # closed, or its owner is gone
        try:
            engine = Engine(model.to(device), compile)  # type: ignore[arg-type]
        except Exception as error:
            connection.send(_failure(error))
            return
        connection.send(Answer())
        while True:
            _answer(connection, engine, connection.recv())


def _answer(connection: Connection, engine: Engine, order: Order) -> None:
    engine.between_batches = partial(_pause, connection, engine) if order.pauses else None
    try:
        answer = Answer(engine.start(order.task)())
    except Exception as error:
        answer = _failure(error)
    connection.send(answer)


def _pause(connection: Connection, engine: Engine) -> None:
    connection.send(Word.PAUSE)
    while (heard := connection.recv()) is not Word.GO_ON:
        if heard is Word.STOP:
            raise Stopped
        _answer(connection, engine, heard)


def _failure(error: Exception) -> Answer:
    """An answer that survives the way to another process."""
    where = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(repr(error))
    return Answer(error=error, where=where)
