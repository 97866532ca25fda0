"""Windows of a command's input on the workers of a Ray cluster."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from flagembedding_matryoshka.cli.work import Results, RowWindow, RowWindows, Work
from flagembedding_matryoshka.inference.fingerprint import resolved_dtype

WINDOWS_PER_WORKER = 2
"""Windows that are read and not written yet, so that a worker waits neither for the input nor for earlier windows."""
DEATHS = 3
"""The command ends after this number of deaths of workers in the same window, or of consecutive workers that start."""
SECONDS_FOR_A_WORKER = 300.0
"""Time that the cluster has to start a worker after all have died."""
RESUME = "The same command resumes after the last complete line of --output."


class Cluster:
    """A Ray cluster: the first that exists of the connected one, that of RAY_ADDRESS and that of this machine, or a new
    one on this machine.

    Args:
        workers: number of workers, each with a GPU of its own, or a CPU if the cluster has no GPU; 0 is one for each.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._was_connected = ray.is_initialized()

    def __enter__(self) -> Cluster:
        """Connect.

        Raises:
            ValueError: if the cluster has fewer GPUs or CPUs than workers.
        """
        if not self._was_connected:
            ray.init(log_to_driver=False)
        found = ray.cluster_resources()
        unit = "GPU" if found.get("GPU") else "CPU"
        room = int(found.get(unit, 0))
        if not 0 < (self.workers or room) <= room:
            self.__exit__()
            raise ValueError(f"{self.workers} workers need a {unit} each, and the Ray cluster has {room}.")
        self.workers = self.workers or room
        self._reserved: dict[str, Any] = {f"num_{unit.lower()}s": 1}
        return self

    def __exit__(self, *exception: Any) -> None:
        """Disconnect, unless the process was connected before."""
        if not self._was_connected:
            ray.shutdown()

    def resolved_dtype(self, options: Mapping[str, Any]) -> str:
        """Return the dtype in which a worker would load weights.

        Args:
            options: arguments of `MatryoshkaReranker` that were given.
        """
        task: Any = ray.remote(**self._reserved)(resolved_dtype)
        try:
            return ray.get(task.remote(options))
        except RayTaskError as error:
            raise error.cause from None

    def compute(
        self, kind: type[Work], arguments: tuple[str, dict[str, Any], dict[str, Any]], waiting: RowWindows
    ) -> Iterator[tuple[RowWindow, list[Any]]]:
        """Yield each window with its results, in order.

        If a worker dies, another worker computes its window, and the cluster starts a new worker, if necessary on
        another node.

        Args:
            arguments: arguments of `kind`; paths in them must exist on every machine.
            waiting: the windows.

        Raises:
            ConnectionError: if workers die repeatedly, or the cluster starts none after all have died.
        """
        crew = _Crew(ray.remote(**self._reserved)(kind), arguments, self.workers)
        limit = WINDOWS_PER_WORKER * self.workers
        unwritten: deque[RowWindow] = deque()
        results: dict[int, list[Any]] = {}
        try:
            while True:
                while len(unwritten) < limit and (window := next(waiting, None)) is not None:
                    unwritten.append(window)
                    crew.queue.append(window)
                if not unwritten:
                    return
                for window, found in crew.wait():
                    waiting.adapt(window, found.seconds)
                    results[window.start] = found.of_rows
                while unwritten and unwritten[0].start in results:
                    window = unwritten.popleft()
                    yield window, results.pop(window.start)
        finally:
            crew.end()


class _Crew:
    """Workers, each with at most one window. A worker that dies is replaced, and its window is queued again.

    Args:
        actor: the remote class of workers.
        arguments: its arguments.
        workers: number of workers.

    Attributes:
        queue: windows that no worker has.
    """

    def __init__(self, actor: Any, arguments: tuple[Any, ...], workers: int) -> None:
        self.queue: deque[RowWindow] = deque()
        self._actor = actor
        self._arguments = arguments
        self._idle: list[Any] = []
        self._tasks: dict[Any, tuple[Any, RowWindow | None]] = {}
        self._deaths: Counter[int | None] = Counter()
        for _ in range(workers):
            self._start()

    def wait(self) -> Iterator[tuple[RowWindow, Results]]:
        """Wait until a worker has started, computed or died. Yield the windows that are computed.

        Raises:
            ConnectionError: as `Cluster.compute`.
        """
        while self.queue and self._idle:
            worker, window = self._idle.pop(), self.queue.popleft()
            self._tasks[worker.run.remote(window)] = worker, window
        all_start = all(window is None for _, window in self._tasks.values())
        timeout = SECONDS_FOR_A_WORKER if self._deaths and all_start else None
        done, _ = ray.wait(list(self._tasks), timeout=timeout)
        if not done:
            raise ConnectionError(
                f"the workers have died, and the Ray cluster has started none within {timeout:g} s. {RESUME}"
            )
        for task in done:
            worker, own = self._tasks.pop(task)
            try:
                found = ray.get(task)
            except RayTaskError as error:  # an error of the work is raised as it is, not as Ray's
                raise error.cause from None
            except RayError as error:
                self._replace(worker, own, error)
                continue
            self._idle.append(worker)
            if own is None:
                self._deaths.pop(None, None)
            else:
                yield own, found

    def end(self) -> None:
        """End all workers."""
        for worker in [*self._idle, *(worker for worker, _ in self._tasks.values())]:
            ray.kill(worker)

    def _start(self) -> None:
        worker = self._actor.remote(*self._arguments)
        self._tasks[worker.__ray_ready__.remote()] = worker, None

    def _replace(self, worker: Any, window: RowWindow | None, error: RayError) -> None:
        """Start a worker in the place of one that died, and queue its window again.

        Raises:
            ConnectionError: if it is the last of `DEATHS`.
        """
        place = None if window is None else window.start
        self._deaths[place] += 1
        if self._deaths[place] == DEATHS:
            of = "that start" if window is None else f"of {window} of the input"
            why = str(error).partition("\n")[0]
            raise ConnectionError(f"{DEATHS} workers {of} have died. The last error: {why} {RESUME}") from error
        if window is not None:
            self.queue.appendleft(window)
        ray.kill(worker)  # it may be alive without a connection to this process
        self._start()
