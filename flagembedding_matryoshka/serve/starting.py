"""The application of a server whose own application takes seconds to import and build."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flagembedding_matryoshka.serve.limits import NOT_LOADED, RETRY_AFTER
from flagembedding_matryoshka.serve.logs import AccessLog, with_request_id


class Starting:
    """ASGI application that answers at once, and hands requests to another application when that one is built.

    Until then `/live` is answered with 200 and every other path with 503 and Retry-After.
    """

    def __init__(self) -> None:
        self._app: ASGIApp = with_request_id(AccessLog(_answer))
        self._reload: Callable[[], None] | None = None
        self._waits_for_reload = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def run(self, building: Future[tuple[Starlette, Callable[[], None]]]) -> None:
        """Hand requests to an application as soon as it is built. Cancel this to end the application's lifespan.

        Args:
            building: future of the application and of a function that loads its model again.

        Raises: the error of building.
        """
        app, reload = await asyncio.wrap_future(building)
        async with app.router.lifespan_context(app):
            self._app, self._reload = app, reload
            if self._waits_for_reload:
                reload()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    def reload(self) -> None:
        """Load the model again, or once more after its first load if the application is not built yet."""
        if self._reload is None:
            self._waits_for_reload = True
        else:
            self._reload()


async def _answer(scope: Scope, receive: Receive, send: Send) -> None:
    path = scope["path"].removeprefix(scope["root_path"])
    if path == "/live" and scope["method"] in ("GET", "HEAD"):
        answer = JSONResponse({"status": "ok"})
    else:
        content = dict.fromkeys(("message", "error", "detail"), NOT_LOADED)
        answer = JSONResponse(content, 503, RETRY_AFTER)
    await answer(scope, receive, send)
