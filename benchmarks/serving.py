"""Requests per second of the server, with and without batching of concurrent requests.

    python -m benchmarks.serving --output serving.json

Clients send one request after the other to a server in this process, each a query with a few short documents for the
shipped re-ranker. The two servers take turns, round after round, after one round that warms up. The last line is a JSON
object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from benchmarks.measuring import environment
from flagembedding_matryoshka import SMOLLM2, MatryoshkaReranker
from flagembedding_matryoshka.serve import Limits, create_app

DOCUMENTS = ["Return the absolute value of a number.", "Open a file and return a stream.", "Sort a list in place."]
SETTINGS = {"one request at a time": 1, "dynamic batches": None}


@contextmanager
def serving(reranker: MatryoshkaReranker, batch_requests: int | None) -> Iterator[str]:
    """The address of a server that computes so many requests together."""
    app = create_app(reranker, "smollm2", Limits(batch_requests=batch_requests))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def load(address: str, clients: int, requests: int, body: Callable[[int], dict[str, Any]]) -> list[float]:
    """Seconds that each request took; `body` is that of a request, by its number."""

    def client(number: int) -> list[float]:
        seconds = []
        with httpx.Client(base_url=address, timeout=60) as connection:
            for index in range(requests):
                start = time.perf_counter()
                connection.post("/rerank", json=body(number * requests + index)).raise_for_status()
                seconds.append(time.perf_counter() - start)
        return seconds

    with ThreadPoolExecutor(clients) as pool:
        return [second for part in pool.map(client, range(clients)) for second in part]


def short_request(number: int) -> dict[str, Any]:
    """A query with a few short documents."""
    return {"query": f"how is item {number} sorted?", "documents": DOCUMENTS}


def measure(clients: int, requests: int, rounds: int) -> list[dict[str, Any]]:
    """Throughput and latency of both servers."""
    rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
    latencies: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with ExitStack() as stack:
        reranker = MatryoshkaReranker(SMOLLM2, devices="cpu", max_length=140)
        addresses = {
            name: stack.enter_context(serving(reranker, batch_requests)) for name, batch_requests in SETTINGS.items()
        }
        for number in range(-1, rounds):
            for name in SETTINGS if number % 2 else reversed(SETTINGS):
                start = time.perf_counter()
                seconds = load(addresses[name], clients, requests, short_request)
                if number >= 0:
                    rates[name].append(len(seconds) / (time.perf_counter() - start))
                    latencies[name] += seconds
    return [
        {
            "setting": name,
            "requests_per_s": statistics.median(rates[name]),
            "requests_per_s_range": [min(rates[name]), max(rates[name])],
            "latency_ms": {
                "median": 1000 * statistics.median(latencies[name]),
                "p95": 1000 * statistics.quantiles(latencies[name], n=20)[-1],
            },
        }
        for name in SETTINGS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32, help="at the same time; default: %(default)s")
    parser.add_argument("--requests", type=int, default=10, help="of each client in a round; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="file to write the JSON to as well")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "benchmark": "serving",
        "environment": environment("cpu"),
        "clients": args.clients,
        "documents": len(DOCUMENTS),
        "settings": measure(args.clients, args.requests, args.rounds),
    }
    for row in report["settings"]:
        low, high = row["requests_per_s_range"]
        latency = row["latency_ms"]
        print(
            f"{row['setting']:24}{row['requests_per_s']:8.1f} requests/s ({low:.1f}–{high:.1f}), "
            f"latency {latency['median']:.0f} ms, 95 % below {latency['p95']:.0f} ms"
        )
    text = json.dumps(report)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
