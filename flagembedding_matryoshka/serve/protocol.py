"""HTTP/1.1 with time limits for clients that send slowly."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

GRACE = 5.0
"""Seconds between the answer 408 to a late body and the end of its connection."""


def impatient_protocol(header_seconds: float, body_seconds: float) -> type[asyncio.Protocol]:
    """Make a subclass of uvicorn's protocol, for `uvicorn.Config(http=…)`, that closes connections

    - without a whole header `header_seconds` after its first byte, or after the connection is made,
    - without a whole body `GRACE` seconds after `body_seconds`,
    - and, when the server ends, without a whole request.
    """
    limits = {h11.IDLE: header_seconds, h11.SEND_BODY: body_seconds + GRACE}

    class ImpatientProtocol(H11Protocol):
        _state: Any = None
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
                # Until the first byte of the next request uvicorn's time limit of idle connections holds.
                self._stop_timer()
                self._state = None
            else:
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def shutdown(self) -> None:
            if self.conn.their_state is h11.SEND_BODY:
                self.transport.close()
            else:
                super().shutdown()

        def _watch(self) -> None:
            """If the state of the client has changed, restart the timer."""
            state = self.conn.their_state
            if state is self._state:
                return
            self._state = state
            self._stop_timer()
            if state in limits and not self.transport.is_closing():
                self._timer = self.loop.call_later(limits[state], self.transport.close)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return ImpatientProtocol
