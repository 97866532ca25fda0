"""Limits of requests, and bodies that are read within them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

RETRY_AFTER = {"Retry-After": "1"}
CLOSE = {"Connection": "close"}
CLIENT_CLOSED_REQUEST = HTTPException(499, "the client closed the connection")
BODIES_AT_ONCE = 32
"""Memory for bodies that have not arrived as a whole, in bodies of the largest size."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        documents: most documents of a request, or chunks of them; with more it gets 422.
        body_bytes: most bytes of a body; a larger one gets 413. If the bodies that are being read have more than 32
            times as many bytes together, the oldest of them gets 429.
        requests: most requests that wait or are computed; others get 429.
        batch_requests: most requests in a batch; None is as many as the tokens of a batch allow.
        body_seconds: time from a request's header to the end of its body; a later one gets 408.
        degrade_to: exit of requests that name no depth, no `min_score` and no calibration, while more than half of
            `requests` wait or are computed; None is off.
    """

    documents: int = 1000
    body_bytes: int = 8_000_000
    requests: int = 512
    batch_requests: int | None = None
    body_seconds: float = 30.0
    degrade_to: int | None = None


class Bodies:
    """Read bodies. If incomplete bodies hold too many bytes, the oldest is given up, so that slow clients do not take
    the memory of fast ones.

    Args:
        most_bytes: most bytes of a body.
        seconds: time for a body to arrive.
    """

    def __init__(self, most_bytes: int, seconds: float) -> None:
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._arriving: dict[asyncio.Task[bytes], int] = {}

    async def read(self, request: Request) -> bytes:
        """Read a body.

        Raises:
            HTTPException: 408, 413, 415, 429, or 499 if the client closes the connection.
        """
        reading = asyncio.ensure_future(self._read(request))
        self._arriving[reading] = 0
        try:
            await asyncio.wait([reading], timeout=self._seconds)
            if not reading.done():
                raise HTTPException(408, f"the body did not arrive within {self._seconds:g} seconds", CLOSE)
            if reading.cancelled():
                raise HTTPException(429, "too many large requests arrive; try again later", RETRY_AFTER | CLOSE)
            return reading.result()
        except ClientDisconnect as error:
            raise CLIENT_CLOSED_REQUEST from error
        finally:
            reading.cancel()
            self._arriving.pop(reading, None)

    async def _read(self, request: Request) -> bytes:
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise HTTPException(415, f"Content-Encoding {encoding!r:.40} is not supported: send the body uncompressed")
        too_large = HTTPException(413, f"the body is larger than {self._most_bytes} bytes", CLOSE)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._most_bytes:
            raise too_large
        body, reading = bytearray(), asyncio.current_task()
        assert reading is not None
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._most_bytes:
                raise too_large
            if reading in self._arriving:
                self._arriving[reading] = len(body)
                self._make_room()
        return bytes(body)

    def _make_room(self) -> None:
        excess = sum(self._arriving.values()) - BODIES_AT_ONCE * self._most_bytes
        for oldest, size in list(self._arriving.items()):
            if excess <= 0:
                break
            del self._arriving[oldest]
            oldest.cancel()
            excess -= size
