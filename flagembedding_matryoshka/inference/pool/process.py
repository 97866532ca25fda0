"""The worker process: it computes tasks one after the other, also while a cascade pauses between two batches."""

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
    """The answer to a task: its results, or an exception with its traceback."""

    result: Any = None
    error: Exception | None = None
    where: str = ""


class Word(Enum):
    """Messages beside orders and answers."""

    PAUSE = auto()
    """From a worker: a task pauses between two batches. The worker takes orders until GO_ON or STOP."""
    GO_ON = auto()
    STOP = auto()


class Stopped(Exception):
    """The run of the task has ended."""


def work(connection: Connection, model: CostWiseForCausalLM, device: str, threads: int, compile: bool) -> None:
    """Load the model, answer whether that worked, and answer orders until the other end of `connection` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    with suppress(EOFError, ConnectionError):  # the parent closed it, or is gone
        try:
            engine = Engine(model.to(device), compile)  # type: ignore[arg-type]
        except Exception as error:
            connection.send(_failure(error))
            return
        connection.send(Answer())
        while True:
            _answer(connection, engine, connection.recv())


def _answer(connection: Connection, engine: Engine, order: Order) -> None:
    between = partial(_pause, connection, engine) if order.pauses else None
    try:
        answer = Answer(engine.start(order.task, between)())
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
    """Return an answer with the exception, or with its text if it cannot be pickled."""
    where = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(repr(error))
    return Answer(error=error, where=where)
