"""Threads for work that would block the event loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def in_background(function: Callable[[], T]) -> Future[T]:
    """Call a function in a thread that does not keep the process alive. Return the future of its result."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def call() -> None:
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=call, daemon=True).start()
    return future


class Threads:
    """A thread pool for one kind of work.

    Args:
        name: name of the threads.
        count: number of threads.
    """

    def __init__(self, name: str, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._submitted: dict[Future[Any], float] = {}

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in a thread, with the context of the caller. If the call is cancelled before a thread takes
        it, the function is not called."""
        future = self._executor.submit(contextvars.copy_context().run, function, *arguments)
        self._submitted[future] = time.monotonic()
        future.add_done_callback(self._submitted.pop)
        return await asyncio.wrap_future(future)

    @property
    def seconds_of_oldest(self) -> float:
        """Seconds since the oldest call that has not ended was made; 0 without such a call."""
        oldest = min(self._submitted.copy().values(), default=None)
        return 0.0 if oldest is None else time.monotonic() - oldest

    def close(self) -> None:
        """Forget calls that no thread has taken. Do not wait for the others."""
        self._executor.shutdown(wait=False, cancel_futures=True)
