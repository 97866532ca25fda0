"""Request ids, taken from the header or generated, in answers and in log records."""

from __future__ import annotations

import logging
import re
import uuid
from contextvars import ContextVar
from time import perf_counter
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-ID"
ACCEPTED = re.compile("[!-~]{1,128}")
PROBES = ("/health", "/live", "/ready", "/metrics")
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")
logger = logging.getLogger(__name__)


class RequestIds:
    """Middleware that gives each request its id and logs a line for it, except for probes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if ACCEPTED.fullmatch(given) else uuid.uuid4().hex
        REQUEST_ID.set(request_id)
        start, status = perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            if scope["path"] not in PROBES:
                path = scope["raw_path"].decode("latin-1")  # as sent, so that it has no line breaks
                fields = {"method": scope["method"], "path": path, "status": status}
                fields["seconds"] = round(perf_counter() - start, 6)
                logger.info("%(method)s %(path)s %(status)d in %(seconds).3f s", fields, extra=fields)


class WithRequestId(logging.Filter):
    """Add the id of the current request to log records, as `request_id`."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = REQUEST_ID.get()
        return True


def log_config(json: bool) -> dict[str, Any]:
    """Return a configuration for `logging.config.dictConfig`: lines on stderr, with `json` as JSON objects."""
    formatter: dict[str, Any] = {"format": "%(levelname)s: %(message)s [%(name)s %(request_id)s]"}
    if json:
        formatter = {
            "()": "pythonjsonlogger.json.JsonFormatter",
            "fmt": "%(asctime)s %(levelname)s %(name)s %(message)s %(request_id)s",
            "datefmt": "%Y-%m-%dT%H:%M:%S%z",
        }
    handler = {"class": "logging.StreamHandler", "formatter": "lines", "filters": ["request_id"]}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request_id": {"()": WithRequestId}},
        "formatters": {"lines": formatter},
        "handlers": {"stderr": handler},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {name: {"level": "INFO"} for name in ("flagembedding_matryoshka.serve", "uvicorn")},
    }
