"""Bodies of requests, as they arrive."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

RETRY_AFTER = {"Retry-After": "1"}
CLOSE = {"Connection": "close"}
CLIENT_CLOSED_REQUEST = HTTPException(499, "the client closed the connection")
BODIES_AT_ONCE = 32
"""Of the largest size allowed, that may lie half-read in memory; smaller ones are more."""


class Bodies:
    """Reads bodies. Where those that have not yet arrived as a whole would hold too many bytes, the one that has taken
    longest is given up: who sends slowly takes the room of nobody who does not.

    Args:
        most_bytes: of a body.
        seconds: until the whole of it has arrived.
    """

    def __init__(self, most_bytes: int, seconds: float) -> None:
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._arriving: dict[asyncio.Task[bytes], int] = {}

    async def read(self, request: Request) -> bytes:
        """The whole body.

        Raises:
            HTTPException: 408, 413, 415, 429, or 499 for a client that went away.
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
            raise HTTPException(415, f"a body with Content-Encoding {encoding!r:.40} is not read; send it as it is")
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
