"""Windows of a command's input on the workers of a Ray cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util import ActorPool

from flagembedding_matryoshka.cli.work import Window, Work

WINDOWS_PER_WORKER = 2
"""One that is computed and one that waits, so that workers never wait for the reading of a file."""
RESTARTS = 3


def compute_on_cluster(
    kind: type[Work], arguments: tuple[str, dict[str, Any], dict[str, Any]], waiting: Iterator[Window], workers: int
) -> Iterator[tuple[Window, list[Any]]]:
    """Yield each window with its results, in order.

    A worker that dies is started again and computes its windows again. The cluster is the connected one, the one that
    RAY_ADDRESS names, the one on this machine, or a new one on this machine.

    Args:
        arguments: arguments of `kind`; paths in them must exist on every machine.
        waiting: the windows.
        workers: number of workers, each with a GPU of its own, or a CPU if the cluster has no GPU; 0 is one for each.

    Raises:
        ValueError: if the cluster has fewer GPUs or CPUs than workers.
    """
    if not ray.is_initialized():
        ray.init(log_to_driver=False)  # the output of workers must not mix with the lines on standard output
    unit = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
    room = int(ray.cluster_resources().get(unit, 0))
    if not 0 < (workers or room) <= room:
        raise ValueError(f"{workers} workers need a {unit} each, and the Ray cluster has {room}.")
    reserved: dict[str, Any] = {f"num_{unit.lower()}s": 1}
    worker: Any = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS, **reserved)(kind)
    pool = ActorPool([worker.remote(*arguments) for _ in range(workers or room)])
    computed: deque[Window] = deque()
    for window in waiting:
        if len(computed) == WINDOWS_PER_WORKER * (workers or room):
            yield computed.popleft(), _next_results(pool)
        computed.append(window)
        pool.submit(lambda actor, rows: actor.run.remote(rows), window)
    while computed:
        yield computed.popleft(), _next_results(pool)


def _next_results(pool: ActorPool) -> list[Any]:
    """Return the results of the next window. Errors of the work are raised as they are, not as Ray's."""
    try:
        return pool.get_next()
    except RayTaskError as error:
        raise error.cause from None
