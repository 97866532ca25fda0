"""Limits of requests, the memory that they hold, and bodies that are read within them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

RETRY_AFTER = {"Retry-After": "1"}
NOT_LOADED = "the model is not loaded yet"
CLOSE = {"Connection": "close"}
CLIENT_CLOSED_REQUEST = HTTPException(499, "the client closed the connection")


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Args:
        documents: most documents of a request, or chunks of them; with more it gets 422.
        body_bytes: most bytes of a body; a larger one gets 413.
        bytes: most bytes of memory that all requests hold, from the first byte of a body to the last of the answer. If
            there would be more, the oldest bodies that have not arrived as a whole get 429, then the request itself.
        requests: most requests from the end of their body to the end of their answer; others get 429.
        batch_requests: most requests in a batch; 1 computes each request alone. None is as many as the tokens of a
            batch allow.
        body_seconds: time from a request's header to the end of its body; a later one gets 408.
        degrade_to: exit of requests that name no depth, no `min_score` and no calibration, while there are more than
            half as many other requests as allowed; each result then has its `cutoff_layer`. None is off.
        cache_bytes: bytes of memory for scores of pairs, which are then not computed again; with `batch_invariant`
            only, and not for cascades and deadlines. None is off.

    Raises:
        ValueError: if `bytes` is less than `body_bytes`.
    """

    documents: int = 1000
    body_bytes: int = 8_000_000
    bytes: int = 1_000_000_000
    requests: int = 512
    batch_requests: int | None = None
    body_seconds: float = 30.0
    degrade_to: int | None = None
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.bytes < self.body_bytes:
            raise ValueError(
                f"max_bytes is {self.bytes}, less than max_body_bytes, which is {self.body_bytes}: all requests "
                "together must have room for one body."
            )


class Budget:
    """The memory that requests hold.

    Args:
        most: most bytes of all requests together.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._shares: dict[Share, None] = {}
        self.held = 0
        """Bytes that requests hold."""

    @contextmanager
    def share(self) -> Iterator[Share]:
        """Give a request its share, of 0 bytes at first. At the end it holds nothing."""
        share = Share(self)
        self._shares[share] = None
        try:
            yield share
        finally:
            self.remove(share)

    def remove(self, share: Share) -> None:
        """Take a share out of the budget, if it is in there."""
        if share in self._shares:
            del self._shares[share]
            self.held -= share.bytes

    def change(self, share: Share, bytes: int) -> None:
        """Set the bytes of a share. Bodies that have not arrived make room, the oldest first.

        Raises:
            HTTPException: 429 if there is not enough room.
        """
        if share not in self._shares:
            raise _too_many_bytes()
        self.held += bytes - share.bytes
        share.bytes = bytes
        arriving = iter([one for one in self._shares if one.arrival is not None] if self.held > self._most else [])
        while self.held > self._most and (oldest := next(arriving, None)) is not None:
            self.remove(oldest)
            assert oldest.arrival is not None
            oldest.arrival.cancel()
        if self.held > self._most:
            raise _too_many_bytes()


class Share:
    """The memory of one request.

    Attributes:
        bytes: number of bytes that it holds.
        arrival: the task that reads the body; None before and after.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.bytes = 0
        self.arrival: asyncio.Task[bytes] | None = None

    def hold(self, bytes: int) -> None:
        """Hold this number of bytes instead of the number before; errors as in `Budget.change`."""
        self._budget.change(self, bytes)


async def read_body(request: Request, share: Share, limits: Limits) -> bytes:
    """Read a body. Meanwhile its share can be taken from it, so that slow clients do not hold the memory of fast ones.

    Raises:
        HTTPException: 408, 413, 415, 429, or 499 if the client closes the connection.
    """
    share.arrival = reading = asyncio.ensure_future(_read(request, share, limits.body_bytes))
    try:
        await asyncio.wait([reading], timeout=limits.body_seconds)
        if not reading.done():
            raise HTTPException(408, f"the body did not arrive within {limits.body_seconds:g} seconds", CLOSE)
        if reading.cancelled():
            raise _too_many_bytes()
        return reading.result()
    except ClientDisconnect as error:
        raise CLIENT_CLOSED_REQUEST from error
    finally:
        reading.cancel()
        share.arrival = None


async def _read(request: Request, share: Share, most: int) -> bytes:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise HTTPException(415, f"Content-Encoding {encoding!r:.40} is not supported: send the body uncompressed")
    too_large = HTTPException(413, f"the body is larger than {most} bytes", CLOSE)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_large
        share.hold(len(body))
    return bytes(body)


def _too_many_bytes() -> HTTPException:
    return HTTPException(429, "too many large requests at one time; try again later", RETRY_AFTER | CLOSE)
