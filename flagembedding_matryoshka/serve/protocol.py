"""HTTP/1.1 with time limits for clients that send or read slowly."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

GRACE = 5.0
"""Seconds between the answer 408 to a late body and the end of its connection, and between the end of a connection and
its abortion, if the client does not read the rest of its answer."""

NOT_SENT = "TCP_NOTSENT_LOWAT"
"""Name of the socket option of Linux and macOS that limits the bytes that wait in the kernel to be sent."""
UNSENT_BYTES = 2**16


def impatient_protocol(header_seconds: float, body_seconds: float, answer_seconds: float) -> type[asyncio.Protocol]:
    """Make a subclass of uvicorn's protocol, for `uvicorn.Config(http=…)`, that closes connections

    - without a whole header `header_seconds` after its first byte, or after the connection is made,
    - without a whole body `GRACE` seconds after `body_seconds`,
    - whose client reads less than about 128 KiB of its answer in `answer_seconds`,
    - and, when the server ends, without a whole request.
    """
    limits = {h11.IDLE: header_seconds, h11.SEND_BODY: body_seconds + GRACE}

    class ImpatientProtocol(H11Protocol):
        _state: Any = None
        _timer: asyncio.TimerHandle | None = None
        _answer_timer: asyncio.TimerHandle | None = None
        _ending = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            own = transport.get_extra_info("socket")
            if own is not None and own.family in (socket.AF_INET, socket.AF_INET6) and hasattr(socket, NOT_SENT):
                # Otherwise the kernel buffers megabytes, and for a long time nothing shows that the client reads.
                own.setsockopt(socket.IPPROTO_TCP, getattr(socket, NOT_SENT), UNSENT_BYTES)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.is_closing():
                self._watch()
            elif self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
                # Until the first byte of the next request uvicorn's time limit of idle connections holds.
                self._stop_timer()
                self._state = None
            else:
                self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._answer_timer = self.loop.call_later(answer_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_answer_timer()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            self._stop_answer_timer()
            super().connection_lost(exc)

        def shutdown(self) -> None:
            if self.conn.their_state is h11.SEND_BODY:
                self.transport.close()
            else:
                super().shutdown()
            self._watch()

        def _watch(self) -> None:
            """If the state of the client or of the connection has changed, restart the timer."""
            if self.transport.is_closing():
                if not self._ending:  # `close` waits until the client has read its answer
                    self._ending = True
                    self._stop_timer()
                    self._timer = self.loop.call_later(GRACE, self.transport.abort)
                return
            state = self.conn.their_state
            if state is self._state:
                return
            self._state = state
            self._stop_timer()
            if state in limits:
                self._timer = self.loop.call_later(limits[state], self._end)

        def _end(self) -> None:
            self.transport.close()
            self._watch()

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _stop_answer_timer(self) -> None:
            if self._answer_timer is not None:
                self._answer_timer.cancel()
                self._answer_timer = None

    return ImpatientProtocol
