"""Spans of OpenTelemetry, if its packages are installed (the extra `otel`). Otherwise nothing is traced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from starlette.applications import Starlette

try:
    from opentelemetry import trace
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
except ImportError:
    trace = None  # type: ignore[assignment]

NAME = "flagembedding_matryoshka"
NOT_TRACED = "/live$,/ready$,/health$,/metrics$"
"""Regular expressions of paths of probes."""


def trace_requests(app: Starlette) -> None:
    """Give each request a span, a child of the one in its header `traceparent`."""
    if trace is not None:
        app.add_middleware(OpenTelemetryMiddleware, excluded_urls=NOT_TRACED, exclude_spans=["receive", "send"])


def span(name: str, **attributes: int) -> AbstractContextManager[Any]:
    """Return a context whose time is a span, a child of the current one."""
    if trace is None:
        return nullcontext()
    return trace.get_tracer(NAME).start_as_current_span(name, attributes=attributes)


@contextmanager
def queue_span() -> Iterator[Callable[[], None]]:
    """Yield a callable that ends a span, which begins here: the time until the first batch."""
    if trace is None:
        yield lambda: None
        return
    waiting = trace.get_tracer(NAME).start_span("queue")
    try:
        yield waiting.end
    finally:
        if waiting.is_recording():  # the client has left the queue
            waiting.end()


class WithTraceparent(logging.Filter):
    """Add the current span to log records, as `traceparent` of W3C's Trace Context; None without a span."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.traceparent = None
        if trace is not None and (found := trace.get_current_span().get_span_context()).is_valid:
            record.traceparent = f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"
        return True
