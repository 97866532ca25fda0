"""The parent's side of a worker process: the tasks that it was given, and its messages."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from flagembedding_matryoshka.inference.engine import Task
from flagembedding_matryoshka.inference.pool.process import Control, TaskAnswer, TaskMessage

SECONDS_TO_LEAVE = 5.0
"""A worker that has not ended this long after its connection was closed is killed."""


class RemoteTraceback(Exception):
    """The traceback of a worker's exception."""


class RunError(Exception):
    """A run ends with `error`, and the workers stay."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@dataclass(eq=False)
class Assignment:
    """A task of a run that a worker was given.

    Attributes:
        number: number of the task in its run.
        answer: the worker's answer; None before it.
        death: how the worker died while it had the task; None if it lives.
        is_abandoned: whether the run has ended, so that no answer is needed.
        is_ahead: whether the worker computes another task of the run first.
    """

    number: int
    task: Task
    answer: TaskAnswer | None = None
    death: str | None = None
    is_abandoned: bool = False
    is_ahead: bool = False


@dataclass(eq=False)
class Worker:
    """The parent's side of a process.

    Attributes:
        loaded: whether it has loaded the model.
        assignments: its tasks. It computes the last one; the earlier ones are cascades that pause between two batches.
        is_paused: whether the last one pauses, too, and waits for `resume`.
        ahead: the tasks that it computes after the last one, all of one run without pauses.
        room: number of tasks in `ahead`, at most.
    """

    device: str
    process: SpawnProcess
    connection: Connection
    loaded: bool = False
    assignments: list[Assignment] = field(default_factory=list)
    is_paused: bool = False
    ahead: deque[Assignment] = field(default_factory=deque)
    room: int = 0

    @property
    def ready(self) -> bool:
        """Whether the worker can take a task."""
        return self.loaded and (self.is_paused or not self.assignments)

    def is_between(self, given: Sequence[Assignment]) -> bool:
        """Return whether the worker pauses in one of these tasks."""
        return self.is_paused and self.assignments[-1] in given

    def takes_ahead(self, given: Sequence[Assignment]) -> bool:
        """Return whether the worker, which computes one of these tasks without pauses, can take one more of its run."""
        has_room = len(self.ahead) < self.room
        return has_room and bool(self.assignments) and not self.is_paused and self.assignments[-1] in given

    def give_ahead(self, assignment: Assignment) -> None:
        """Send a task that is computed after the last one, without pauses."""
        assignment.is_ahead = True
        self.ahead.append(assignment)
        self._send(TaskMessage(assignment.task, False))

    def give(self, assignment: Assignment, pauses: bool) -> None:
        """Send a task, which pauses between the batches of a cascade if `pauses` is true."""
        self.assignments.append(assignment)
        self.is_paused = False
        self._send(TaskMessage(assignment.task, pauses))

    def resume(self) -> None:
        """Let the paused task continue, or stop it if its run has ended."""
        self.is_paused = False
        self._send(Control.STOP if self.assignments[-1].is_abandoned else Control.GO_ON)

    def read(self) -> None:
        """Receive the next message.

        Raises:
            EOFError, OSError: if the worker is dead.
            RunError: if the worker cannot load the model.
        """
        heard: TaskAnswer | Control = self.connection.recv()
        if isinstance(heard, TaskAnswer) and heard.error is not None:
            heard.error.__cause__ = RemoteTraceback(f"in the worker of {self.device}\n{heard.where}")
        if isinstance(heard, TaskAnswer) and not self.loaded:
            if heard.error is not None:
                raise RunError(heard.error)
            self.loaded = True
            return
        if isinstance(heard, TaskAnswer):
            self.assignments.pop().answer = heard
            if self.ahead:
                self.assignments.append(self.ahead.popleft())
                self.assignments[-1].is_ahead = False
                return
        self.is_paused = bool(self.assignments)
        if self.is_paused and self.assignments[-1].is_abandoned:
            self.resume()

    def end(self) -> int | None:
        """Return the exit code, after the process has ended by itself or was killed."""
        self.connection.close()
        self.process.join(SECONDS_TO_LEAVE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode

    def _send(self, words: TaskMessage | Control) -> None:
        with suppress(OSError):  # the worker is dead, and `read` raises
            self.connection.send(words)
