"""Metrics of the server, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException

from flagembedding_matryoshka.serve.batching import BatchReport
from flagembedding_matryoshka.serve.cache import ScoreCache

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
POWERS = tuple(2**exponent for exponent in range(11))
TOKENS = tuple(2**exponent for exponent in range(6, 20))


class _CacheCollector(Collector):
    """Metrics that are read from the cache of scores."""

    def __init__(self, cache: ScoreCache) -> None:
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        about = "Pairs that were looked for in the cache of scores; result is found or missed"
        pairs = CounterMetricFamily("matryoshka_cache_pairs", about, labels=["result"])
        pairs.add_metric(["found"], self._cache.found)
        pairs.add_metric(["missed"], self._cache.missed)
        yield pairs
        about = "Bytes of memory that the cache of scores holds"
        yield GaugeMetricFamily("matryoshka_cache_bytes", about, self._cache.held)


class Metrics:
    """Counters, gauges and histograms of one server, and on Linux memory, CPU time and open files of its process.

    Args:
        requests: returns the number of requests that count for the limit.
        limit: limit of requests.
        held: returns the bytes of memory that requests hold.
        most_bytes: limit of these bytes.
        cache: the cache of scores; None is no cache.
    """

    def __init__(
        self,
        requests: Callable[[], int],
        limit: int,
        held: Callable[[], int],
        most_bytes: int,
        cache: ScoreCache | None = None,
    ) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: Sequence[str] = ()) -> Histogram:
            return Histogram(f"matryoshka_{name}", text, labels, buckets=buckets, registry=self.registry)

        by_path = ["path", "status"]
        self._requests = Counter("matryoshka_requests", "Requests", by_path, registry=self.registry)
        self._tokens = Counter("matryoshka_tokens", "Tokens that the model has computed", registry=self.registry)
        about = "From a request to the end of its answer; status is 2xx, 4xx or 5xx"
        self._latency = histogram("request_seconds", about, SECONDS, by_path)
        about = "From the tokens of a query and its documents to their first batch"
        self._queue_latency = histogram("queue_seconds", about, SECONDS)
        self._batch_latency = histogram("batch_seconds", "Computation of a batch", SECONDS)
        self._batch_requests = histogram("batch_requests", "Requests in a batch", POWERS)
        self._batch_documents = histogram("batch_documents", "Documents in a batch", POWERS)
        self._batch_tokens = histogram("batch_tokens", "Tokens in a batch", TOKENS)
        self._degraded = Counter(
            "matryoshka_degraded_requests", "Requests answered at the exit of --degrade_to", registry=self.registry
        )

        about = "Models that were loaded while the server ran; result is loaded or failed"
        self._reloads = Counter("matryoshka_reloads", about, ["result"], registry=self.registry)

        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(f"matryoshka_{name}", text, labels, registry=self.registry)

        gauge("queue_requests", "Requests from the end of their body to the end of their answer").set_function(requests)
        gauge("queue_limit", "Most of these requests").set(limit)
        gauge("request_bytes", "Bytes of memory that requests hold").set_function(held)
        gauge("request_bytes_limit", "Most of these bytes").set(most_bytes)
        self._model = gauge("model_info", "1 for the model that computes", ["fingerprint"])
        if cache is not None:
            self.registry.register(_CacheCollector(cache))

    @contextmanager
    def request(self, path: str) -> Iterator[None]:
        """Count the enclosed code as a request to a path, with its status and its latency."""
        start, status = perf_counter(), 500
        try:
            yield
            status = 200
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            self._requests.labels(path, status).inc()
            self._latency.labels(path, f"{status // 100}xx").observe(perf_counter() - start)

    def model(self, fingerprint: str) -> None:
        """Show the fingerprint of the model that computes from now on."""
        self._model.clear()
        self._model.labels(fingerprint).set(1)

    def reloaded(self, result: Literal["loaded", "failed"]) -> None:
        """Count a model that was loaded, or could not be loaded, in place of the one before."""
        self._reloads.labels(result).inc()

    def degraded(self) -> None:
        """Count a request that is answered at the exit of `degrade_to`."""
        self._degraded.inc()

    def batch(self, report: BatchReport) -> None:
        """Count a batch."""
        self._tokens.inc(report.tokens)
        self._batch_latency.observe(report.seconds)
        for seconds in report.queued:
            self._queue_latency.observe(seconds)
        self._batch_requests.observe(report.requests)
        self._batch_documents.observe(report.items)
        self._batch_tokens.observe(report.tokens)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
