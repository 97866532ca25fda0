"""The parent's side of a worker process: what it was given, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from flagembedding_matryoshka.inference.engine import Task
from flagembedding_matryoshka.inference.pool.process import Answer, Order, Word

SECONDS_TO_LEAVE = 5.0


class RemoteTraceback(Exception):
    """Where in a worker its exception was raised."""


class RunEnded(Exception):
    """A run ends with `error`, and the workers live."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@dataclass(eq=False)
class Assignment:
    """A task of a run that a worker was given.

    Attributes:
        number: of the task in its run.
        answer: what came of it.
        death: how its worker died with it.
        is_abandoned: whether nobody waits for the answer any more.
    """

    number: int
    task: Task
    answer: Answer | None = None
    death: str | None = None
    is_abandoned: bool = False


@dataclass(eq=False)
class Worker:
    """The parent's side of a process.

    Attributes:
        loaded: whether it has the model.
        assignments: it computes the last one; those in front of it are cascades, between two batches.
        is_paused: whether the last one is, too, and waits to be resumed.
    """

    device: str
    process: SpawnProcess
    connection: Connection
    loaded: bool = False
    assignments: list[Assignment] = field(default_factory=list)
    is_paused: bool = False

    @property
    def ready(self) -> bool:
        """Whether it can take a task."""
        return self.loaded and (self.is_paused or not self.assignments)

    def is_between(self, given: Sequence[Assignment]) -> bool:
        """Whether it is paused in one of these."""
        return self.is_paused and self.assignments[-1] in given

    def give(self, assignment: Assignment, pauses: bool) -> None:
        self.assignments.append(assignment)
        self.is_paused = False
        self._send(Order(assignment.task, pauses))

    def resume(self) -> None:
        """Let it go on, or stop what nobody waits for."""
        self.is_paused = False
        self._send(Word.STOP if self.assignments[-1].is_abandoned else Word.GO_ON)

    def read(self) -> None:
        """Take in what it says next.

        Raises:
            EOFError, OSError: if it is dead.
            RunEnded: if it cannot load the model.
        """
        heard: Answer | Word = self.connection.recv()
        if isinstance(heard, Answer) and heard.error is not None:
            heard.error.__cause__ = RemoteTraceback(f"in the worker of {self.device}\n{heard.where}")
        if isinstance(heard, Answer) and not self.loaded:
            if heard.error is not None:
                raise RunEnded(heard.error)
            self.loaded = True
            return
        if isinstance(heard, Answer):
            self.assignments.pop().answer = heard
        self.is_paused = bool(self.assignments)
        if self.is_paused and self.assignments[-1].is_abandoned:
            self.resume()

    def end(self) -> int | None:
        """Its exit code, once it has left by itself or been killed."""
        self.connection.close()
        self.process.join(SECONDS_TO_LEAVE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode

    def _send(self, words: Order | Word) -> None:
        with suppress(OSError):  # it is dead, which reading from it tells
            self.connection.send(words)
