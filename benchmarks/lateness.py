"""Measure how late the server answers requests with a deadline, while other clients send rankings and scores.

    python -m benchmarks.lateness --output lateness.json

32 clients send one request after the other, with no pause, to a server in this process: rankings of several sizes,
cascades, scores, and deadlines of several lengths. Deadlines are multiples of the time that a full batch takes at full
depth when nothing else runs. Lateness is the time from sending a request to its complete answer, by the client's clock,
less the deadline; below 0 the answer is early. A step is what the model computes before it looks at the queue again:
a batch, or one batch of a cascade or deadline. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np

from benchmarks.measuring import LENGTHS, environment
from benchmarks.serving import serving
from flagembedding_matryoshka import SMOLLM2, MatryoshkaReranker

WORDS = (
    "return",
    "the",
    "absolute",
    "value",
    "of",
    "a",
    "number",
    "open",
    "file",
    "and",
    "sort",
    "list",
    "in",
    "place",
)
DOCUMENT_WORDS = (5, 60)
AIM_MS = 100.0
"""p95 of the lateness is to be at most this and one step."""


@dataclass(frozen=True)
class Kind:
    """A kind of request.

    Attributes:
        name: its name in the report.
        clients: number of clients that send it.
        documents: number of documents of a request.
        options: other fields of the body.
        path: path of the request.
        steps: the deadline, in steps of a full batch; None is no deadline.
    """

    name: str
    clients: int
    documents: int
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str = "/rerank"
    steps: float | None = None

    def body(self, dice: random.Random, deadline_ms: float | None) -> dict[str, Any]:
        """Return the body of a request with random texts."""
        texts = [" ".join(dice.choices(WORDS, k=dice.randint(*DOCUMENT_WORDS))) for _ in range(self.documents)]
        query = " ".join(dice.choices(WORDS, k=6))
        names = ("text_1", "text_2") if self.path == "/score" else ("query", "documents")
        body = dict(zip(names, (query, texts), strict=True)) | self.options
        return body if deadline_ms is None else body | {"deadline_ms": deadline_ms}


def kinds(first_exit: int) -> list[Kind]:
    """Return the kinds of request, of 32 clients together. Cascades drop documents at the first exit."""
    return [
        Kind("ranking of 3", 10, 3),
        Kind("ranking of 30", 6, 30),
        Kind("ranking of 100", 2, 100),
        Kind("cascade of 300", 2, 300, {"cascade": {first_exit: 0.3}}),
        Kind("scores of 10", 6, 10, path="/score"),
        Kind("ranking of 3, short deadline", 2, 3, steps=4),
        Kind("ranking of 10, medium deadline", 2, 10, steps=8),
        Kind("ranking of 30, long deadline", 2, 30, steps=16),
    ]


@contextmanager
def timed_steps(reranker: MatryoshkaReranker) -> Iterator[list[float]]:
    """A list that gets the seconds of each step of `score_lists`, without the time of others between two steps."""
    seconds: list[float] = []
    score_lists = reranker.score_lists

    def timed(lists: Any, *, between_batches: Callable[[], None], **options: Any) -> Any:
        start, is_first = time.perf_counter(), True

        def between() -> None:
            nonlocal start, is_first
            if not is_first:  # nothing is computed before the first step
                seconds.append(time.perf_counter() - start)
            between_batches()
            start, is_first = time.perf_counter(), False

        found = score_lists(lists, between_batches=between, **options)
        seconds.append(time.perf_counter() - start)
        return found

    with mock.patch.object(reranker, "score_lists", timed):
        yield seconds


def full_batch_ms(reranker: MatryoshkaReranker, repeats: int = 3) -> float:
    """Return the median milliseconds of a full batch at full depth, when nothing else runs."""
    pair = ("", " ".join(WORDS * 9))
    count = max(1, reranker.max_tokens_per_batch // reranker.tokenize([pair])[0].own_length)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        reranker.compute_score([pair] * count, show_progress_bar=False)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def send(address: str, kind: Kind, deadline_ms: float | None, seed: int, end: float) -> list[float]:
    """Send requests until a time, at least one. Return the milliseconds of each until its complete answer."""
    dice, milliseconds = random.Random(seed), list[float]()
    with httpx.Client(base_url=address, timeout=None) as client:
        while not milliseconds or time.perf_counter() < end:
            body = kind.body(dice, deadline_ms)
            start = time.perf_counter()
            client.post(kind.path, json=body).raise_for_status()
            milliseconds.append(1000 * (time.perf_counter() - start))
    return milliseconds


def spread(milliseconds: Sequence[float]) -> dict[str, float]:
    """Return median, p95 and maximum."""
    found = np.percentile(milliseconds, (50, 95, 100))
    return dict(zip(("median", "p95", "most"), (round(float(value), 1) for value in found), strict=True))


def measure(reranker: MatryoshkaReranker, seconds: float) -> dict[str, Any]:
    """Send all kinds of request at the same time, for some seconds. Return the report."""
    rows, lateness = [], list[float]()
    mixed = kinds(reranker.config.exit_layers[0])
    with ThreadPoolExecutor(32) as pool, serving(reranker, None) as address, timed_steps(reranker) as steps:
        # In a thread as the server's: OpenMP's threads of the main one spin, which costs more if processors are shared.
        alone_ms = pool.submit(full_batch_ms, reranker).result()
        end = time.perf_counter() + seconds
        sending = []
        for number, kind in enumerate(mixed):
            limit = None if kind.steps is None else round(kind.steps * alone_ms, 1)
            own = [pool.submit(send, address, kind, limit, 100 * number + n, end) for n in range(kind.clients)]
            sending.append((kind, limit, own))
        for kind, limit, own in sending:
            found = [one for client in own for one in client.result()]
            row: dict[str, Any] = {"kind": kind.name, "clients": kind.clients, "requests": len(found)}
            row["latency_ms"] = spread(found)
            if limit is not None:
                late = [one - limit for one in found]
                row |= {"deadline_ms": limit, "lateness_ms": spread(late)}
                lateness += late
            rows.append(row)
    step_ms = spread([1000 * one for one in steps])
    aim = AIM_MS + step_ms["p95"]
    return {
        "max_tokens_per_batch": reranker.max_tokens_per_batch,
        "full_batch_alone_ms": round(alone_ms, 1),
        "step_ms": step_ms,
        "steps": len(steps),
        "lateness_ms": spread(lateness),
        "aim_ms": round(aim, 1),
        "kinds": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", help="default: %(default)s")
    parser.add_argument("--max_tokens_per_batch", type=int, help="default: the model's")
    parser.add_argument("--seconds", type=float, default=120, help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    reranker = MatryoshkaReranker(
        options.model,
        devices="cpu",
        dtype=options.dtype,
        max_tokens_per_batch=options.max_tokens_per_batch,
        **LENGTHS,
    )
    about = environment("cpu") | {"dtype": str(reranker.model.dtype).removeprefix("torch.")}
    report = {"benchmark": "lateness", "environment": about} | measure(reranker, options.seconds)
    for row in report["kinds"]:
        late = row.get("lateness_ms")
        text = "" if late is None else f"; late by {late['median']:.0f} ms, 95 % by at most {late['p95']:.0f} ms"
        print(f"{row['kind']:32}{row['requests']:6} requests, {row['latency_ms']['median']:.0f} ms{text}")
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
