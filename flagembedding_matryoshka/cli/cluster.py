"""The windows of a job on the workers of a Ray cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import ray
from ray.util import ActorPool

from flagembedding_matryoshka.cli.job import Job, Window

WINDOWS_PER_WORKER = 2
"""One that is computed and one that waits: a worker never waits for the reading of a file."""
RESTARTS = 3


def compute_on_cluster(
    kind: type[Job], arguments: tuple[str, dict[str, Any], dict[str, Any]], waiting: Iterator[Window], workers: int
) -> Iterator[tuple[Window, list[Any]]]:
    """Each window with its results, in order. A worker that dies is started again, and what it had computed again.

    The cluster is the one that is connected, that RAY_ADDRESS names or that runs on this machine; else one is started.

    Args:
        arguments: those of `kind`; paths must be there on every machine.
        workers: each reserves a GPU or, if there is none in the cluster, a CPU; 0 is as many as there is room for.

    Raises:
        ValueError: if the cluster has no room for so many.
    """
    if not ray.is_initialized():
        ray.init(log_to_driver=False)  # what workers print must not come between the lines of standard output
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
            yield computed.popleft(), pool.get_next()
        computed.append(window)
        pool.submit(lambda actor, rows: actor.run.remote(rows), window)
    while computed:
        yield computed.popleft(), pool.get_next()
