"""Log records: one for each request, with its id, as lines or as JSON."""

from __future__ import annotations

import logging
import logging.config
import re
from time import perf_counter
from typing import Any

from asgi_correlation_id import CorrelationIdMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flagembedding_matryoshka.serve.tracing import WithTraceparent

REQUEST_ID = re.compile("[!-~]{1,128}")
"""Values of X-Request-ID that clients may choose."""
PROBES = ("/health", "/live", "/ready", "/metrics")
logger = logging.getLogger(__name__)


class AccessLog:
    """Middleware that logs a line for each request, except for probes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = perf_counter(), 0

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note_status)
        finally:
            if scope["path"] not in PROBES:
                path = scope["raw_path"].decode("latin-1")  # as sent, so that it has no line breaks
                fields = {"method": scope["method"], "path": path, "status": status}
                fields["seconds"] = round(perf_counter() - start, 6)
                message = "%(method)s %(path)s %(status)d in %(seconds).3f s"
                if (key := scope.get("state", {}).get("key")) is not None:
                    message, fields["key"] = f"{message}, key %(key)s", key
                logger.info(message, fields, extra=fields)


def with_request_id(app: ASGIApp) -> ASGIApp:
    """Return an application whose requests have an id, in their answers and in the log."""
    return CorrelationIdMiddleware(app, validator=lambda given: REQUEST_ID.fullmatch(given) is not None)


def configure_logging(json: bool) -> None:
    """Write all log records and warnings of the process to stderr, as `log_config` says."""
    logging.config.dictConfig(log_config(json))
    logging.captureWarnings(True)


def configure_transformers_logging() -> None:
    """Let transformers log as the rest of the process, without progress bars. It imports transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()


def log_config(json: bool) -> dict[str, Any]:
    """Return a configuration for `logging.config.dictConfig`: lines on stderr, with `json` as JSON objects."""
    formatter: dict[str, Any] = {"format": "%(levelname)s: %(message)s [%(name)s %(correlation_id)s]"}
    if json:
        formatter = {
            "()": "pythonjsonlogger.json.JsonFormatter",
            "fmt": "%(asctime)s %(levelname)s %(name)s %(message)s %(correlation_id)s %(traceparent)s",
            "rename_fields": {"correlation_id": "request_id"},
            "datefmt": "%Y-%m-%dT%H:%M:%S%z",
        }
    handler = {"class": "logging.StreamHandler", "formatter": "lines", "filters": ["request_id", "traceparent"]}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {
            "request_id": {"()": "asgi_correlation_id.CorrelationIdFilter", "default_value": "-"},
            "traceparent": {"()": WithTraceparent},
        },
        "formatters": {"lines": formatter},
        "handlers": {"stderr": handler},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {name: {"level": "INFO"} for name in ("flagembedding_matryoshka.serve", "uvicorn")}
        | {"asgi_correlation_id": {"level": "ERROR"}},  # it warns of each id that a client may not choose
    }
