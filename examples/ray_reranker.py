"""Score on a Ray cluster, as a batch job and as a service.

    python examples/ray_reranker.py score --model output --input pairs --output scored --workers 2
    python examples/ray_reranker.py serve --model output --workers 2

`score` reads JSON Lines with `query` and `passage` (a file or a directory) and writes them with `score` added. `serve`
answers all paths and forms of `flagembedding-matryoshka serve` on port 8000, to the same clients, with the key in
MATRYOSHKA_API_KEY. Each worker batches the requests that it gets. Both use a worker per GPU if the cluster has GPUs.
They need the extras `ray` and `serve`.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

import numpy as np
import ray
from fastapi import FastAPI
from ray import serve

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.serve import Limits, create_app
from flagembedding_matryoshka.serve.__main__ import read_api_keys


class BatchJob:
    """A callable for `Dataset.map_batches`. Arguments are those of `MatryoshkaReranker`."""

    def __init__(self, model: str, **options: Any) -> None:
        self.reranker = MatryoshkaReranker(model, **options)

    def __call__(self, batch: dict[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
        """Return the rows with a score added."""
        pairs = list(zip(batch["query"].tolist(), batch["passage"].tolist(), strict=True))
        return batch | {"score": np.array(self.reranker.compute_score(pairs, show_progress_bar=False, **options))}


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
    """Serve on port 8000. Each worker loads the model and mounts the server's own application."""
    limits, api_key = Limits(), read_api_keys(None)

    def build() -> FastAPI:
        return create_app(MatryoshkaReranker(model), Path(model).name, limits, api_key)

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="Reranker",
        num_replicas=workers,
        ray_actor_options=resources(),
        max_ongoing_requests=limits.requests,  # Ray's default of 5 would leave batches small
    )
    return serve.run(deployment.bind(), route_prefix="/")


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
        print("Serving http://127.0.0.1:8000; stop with Ctrl-C.", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
