"""All measurements of one card, in one call: scoring at the shapes of published models, and a server under load.

    python -m benchmarks.gpu --output results
    python -m benchmarks.gpu --output results --dry_run     # the same code with tiny shapes, on a CPU

Weights are random. Scoring is that of `benchmarks.scoring`, against padded batches: full depth, half of it, ratio 2, a
query that 100 candidates share and a cascade among them. The server's load, with the template of Qwen3-Reranker: 16
clients send one request after another, each a query with 64 documents, in pairs of about 155 tokens. Results are
written after each shape. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import environment
from benchmarks.scoring.checkpoints import config_of, write_checkpoint
from benchmarks.scoring.measurements import measure_shape
from benchmarks.scoring.report import print_table
from benchmarks.scoring.texts import random_texts, words_of
from benchmarks.serving import load, serving
from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.gguf import SMOLLM2_BASE_NAME
from flagembedding_matryoshka.checkpoints.loading import load_tokenizer

TEMPLATE = "qwen3-reranker"
QUERY_WORDS = 10


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often.

    Attributes:
        scoring, serving: shapes, by name.
        pairs, rounds: of each call, and calls of each setting.
        clients, requests: of the server; requests are those of each client in a round.
        documents, tokens: of a request, and of a pair.
    """

    device: str
    dtype: str
    compile: bool
    scoring: Sequence[str]
    serving: Sequence[str]
    pairs: int
    rounds: int
    clients: int
    requests: int
    documents: int
    tokens: int


CARD = Plan(
    device="cuda",
    dtype="bfloat16",
    compile=True,
    scoring=("qwen3-0.6b", "qwen3-4b", "qwen3-8b", "mistral-7b"),
    serving=("qwen3-0.6b", "qwen3-4b", "qwen3-8b"),
    pairs=400,
    rounds=5,
    clients=16,
    requests=10,
    documents=64,
    tokens=155,
)
DRY = Plan(
    device="cpu",
    dtype="float32",
    compile=False,
    scoring=("qwen3-4x128",),
    serving=("qwen3-4x128",),
    pairs=4,
    rounds=1,
    clients=2,
    requests=2,
    documents=3,
    tokens=155,
)


def measure_scoring(shape: str, plan: Plan, tokenizer: str) -> dict[str, Any]:
    """All settings of a shape."""
    given = {name: getattr(plan, name) for name in ("device", "dtype", "compile", "pairs", "rounds")}
    found = measure_shape(shape, argparse.Namespace(**given, tokenizer=tokenizer, pairs_only=False))
    print_table(found)
    return found


def measure_serving(shape: str, plan: Plan, tokenizer: str) -> dict[str, Any]:
    """Pairs per second of a server under load, and the latency of its requests. A round before warms it up."""
    known = load_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as path:
        write_checkpoint(config_of(shape, len(known)), known, path, getattr(torch, plan.dtype), plan.device)
        reranker = MatryoshkaReranker(
            path, dtype=plan.dtype, devices=plan.device, compile=plan.compile, template=TEMPLATE, max_length=512
        )
    draw, words = random.Random(0), words_of(known)
    around = len(reranker.tokenize([(" ".join(draw.choices(words, k=QUERY_WORDS)), "")])[0])

    def texts(count: int, length: int) -> list[str]:
        return random_texts(words, count, (length, length), draw)

    def requests() -> list[dict[str, Any]]:
        queries = texts(plan.clients * plan.requests, QUERY_WORDS)
        return [{"query": query, "documents": texts(plan.documents, plan.tokens - around)} for query in queries]

    rates, latencies = [], list[float]()
    with serving(reranker, None) as address:
        for number in range(-1, plan.rounds):
            bodies = requests()
            start = time.perf_counter()
            seconds = load(address, plan.clients, plan.requests, bodies.__getitem__)
            if number >= 0:
                rates.append(len(bodies) * plan.documents / (time.perf_counter() - start))
                latencies += seconds
    pairs = [(bodies[0]["query"], document) for document in bodies[0]["documents"]]
    found = {
        "shape": shape,
        "dtype": plan.dtype,
        "clients": plan.clients,
        "documents": plan.documents,
        "tokens_per_pair": statistics.median(map(len, reranker.tokenize(pairs))),
        "pairs_per_s": statistics.median(rates),
        "pairs_per_s_range": [min(rates), max(rates)],
        "latency_ms": {
            "median": 1000 * statistics.median(latencies),
            "p95": 1000 * statistics.quantiles(latencies, n=20)[-1],
        },
    }
    print(
        f"{shape}: {plan.clients} clients, requests of {plan.documents} pairs of {found['tokens_per_pair']:.0f} "
        f"tokens: {found['pairs_per_s']:.1f} pairs/s, latency {found['latency_ms']['median']:.0f} ms",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory for gpu.json")
    parser.add_argument("--tokenizer", default=SMOLLM2_BASE_NAME, help="default: the shipped re-ranker's base's")
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes on a CPU")
    args = parser.parse_args()
    plan = DRY if args.dry_run else CARD
    if plan.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available: measure on a machine with a card, or use --dry_run")
    args.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"benchmark": "gpu", "environment": environment(plan.device), "scoring": [], "serving": []}
    for part, shapes, measure in (
        ("scoring", plan.scoring, measure_scoring),
        ("serving", plan.serving, measure_serving),
    ):
        for shape in shapes:
            report[part].append(measure(shape, plan, args.tokenizer))
            (args.output / "gpu.json").write_text(json.dumps(report) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
