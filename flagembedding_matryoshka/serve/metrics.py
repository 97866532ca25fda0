"""Metrics of the server, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from flagembedding_matryoshka.serve.batching import BatchReport

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
POWERS = tuple(2**exponent for exponent in range(11))
TOKENS = tuple(2**exponent for exponent in range(6, 20))


class Metrics:
    """Counters, gauges and histograms of one server.

    Args:
        waiting: returns the number of tasks in the queue.
        limit: limit of requests.
    """

    def __init__(self, waiting: Callable[[], int], limit: int) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"matryoshka_{name}", text, buckets=buckets, registry=self.registry)

        self._requests = Counter("matryoshka_requests", "Requests by status", ["status"], registry=self.registry)
        self._tokens = Counter("matryoshka_tokens", "Tokens that the model has read", registry=self.registry)
        self._latency = histogram("request_seconds", "From a request to its answer", SECONDS)
        self._batch_latency = histogram("batch_seconds", "Computation of a batch", SECONDS)
        self._batch_requests = histogram("batch_requests", "Requests in a batch", POWERS)
        self._batch_documents = histogram("batch_documents", "Documents in a batch", POWERS)
        self._batch_tokens = histogram("batch_tokens", "Tokens in a batch", TOKENS)
        self._degraded = Counter(
            "matryoshka_degraded_requests", "Requests answered at the exit of --degrade_to", registry=self.registry
        )
        queue = Gauge("matryoshka_queue_requests", "Requests that wait or are computed", registry=self.registry)
        queue.set_function(waiting)
        most = Gauge("matryoshka_queue_limit", "How many may wait or be computed", registry=self.registry)
        most.set(limit)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count the enclosed code as a request, with its status and its latency."""
        start, status = perf_counter(), 500
        try:
            yield
            status = 200
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            self._requests.labels(status).inc()
            self._latency.observe(perf_counter() - start)

    def degraded(self) -> None:
        """Count a request that is answered at the exit of `degrade_to`."""
        self._degraded.inc()

    def batch(self, report: BatchReport) -> None:
        """Count a batch."""
        self._tokens.inc(report.tokens)
        self._batch_latency.observe(report.seconds)
        self._batch_requests.observe(report.requests)
        self._batch_documents.observe(report.items)
        self._batch_tokens.observe(report.tokens)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
