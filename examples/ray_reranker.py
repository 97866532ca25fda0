"""Score on a Ray cluster, as a batch job and as a service.

    python examples/ray_reranker.py score --model output --input pairs --output scored --workers 2
    python examples/ray_reranker.py serve --model output --workers 2

`score` reads JSON Lines with `query` and `passage` (a file or a directory) and writes them with `score` added. `serve`
answers POST /rerank with {"query": …, "documents": […], "top_k": …, "cutoff_layers": …}; a worker computes a request at
a time. Both use a worker per GPU if the cluster has GPUs. They need the extra `ray`.
"""

from __future__ import annotations

import argparse
import signal
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from flagembedding_matryoshka import MatryoshkaReranker


class RayReranker:
    """The re-ranker of a worker. Arguments are those of `MatryoshkaReranker`."""

    def __init__(self, model: str, **options: Any) -> None:
        self.reranker = MatryoshkaReranker(model, **options)

    def score(self, batch: dict[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
        """Return the rows with a score added."""
        pairs = list(zip(batch["query"].tolist(), batch["passage"].tolist(), strict=True))
        return batch | {"score": np.array(self.reranker.compute_score(pairs, show_progress_bar=False, **options))}

    def rank(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the hits of a request, best first."""
        return self.reranker.rank(**request)


class BatchJob(RayReranker):
    """A callable for `Dataset.map_batches`."""

    __call__ = RayReranker.score


@serve.deployment
class Deployment(RayReranker):
    """A deployment for `serve.run`."""

    async def __call__(self, request: Request) -> Any:
        """Return the answer, or the error of the request with status 422."""
        try:
            return self.rank(await request.json())
        except (TypeError, ValueError) as error:
            return JSONResponse({"message": str(error)}, 422)


def resources() -> dict[str, int]:
    """Return the resources that a worker reserves."""
    return {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}


def score(model: str, source: str, output: str, workers: int) -> None:
    """Read pairs, score them on all workers and write them."""
    rows = ray.data.read_json(source)
    scored = rows.map_batches(
        BatchJob, fn_constructor_args=(model,), concurrency=workers, batch_size=1024, **resources()
    )
    scored.write_json(output)


def start(model: str, workers: int) -> serve.handle.DeploymentHandle:
    """Serve POST /rerank on port 8000."""
    deployment = Deployment.options(num_replicas=workers, ray_actor_options=resources())
    return serve.run(deployment.bind(model), route_prefix="/rerank")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("score", "serve"):
        command = commands.add_parser(name)
        command.add_argument("--model", required=True)
        command.add_argument("--workers", type=int, default=1)
        if name == "score":
            command.add_argument("--input", required=True)
            command.add_argument("--output", required=True)
    options = parser.parse_args()
    ray.init()
    if options.command == "score":
        score(options.model, options.input, options.output, options.workers)
    else:
        start(options.model, options.workers)
        print("Serving POST http://127.0.0.1:8000/rerank; stop with Ctrl-C.", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
