"""What online serving adds to vLLM-Omni's API server, through the server's own option for it::

    vllm serve MODEL --omni --middleware port_kit.runtime.serving.CancelOnDisconnect

Of vLLM-Omni's video endpoints, ``POST /v1/videos/sync`` computes on when its caller has hung up. With many impatient
callers the engine is then busy with videos that nobody will fetch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)

#: Requests whose answer exists only as the response itself: without a listener the work is for nothing.
PATHS = frozenset({"/v1/videos/sync"})


class CancelOnDisconnect:
    """ASGI middleware: cancels a request of :data:`PATHS` when its client disconnects.

    The endpoint sees ``asyncio.CancelledError``; vLLM-Omni's client then aborts the request in the engine, and a
    pipeline that supports cancellation stops before its next denoising step. Jobs (``POST /v1/videos``) are not
    touched: they are meant to outlive the connection, and are cancelled by ``DELETE``.

    Args:
        app: the application that is wrapped; vLLM passes it.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http" or scope["path"] not in PATHS:
            await self.app(scope, receive, send)
            return
        # One message at a time: an upload is read no faster than the application takes it.
        messages: asyncio.Queue[Message] = asyncio.Queue(maxsize=1)
        work = asyncio.ensure_future(self.app(scope, messages.get, send))
        watch = asyncio.ensure_future(_pass_on(receive, messages))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                logger.info("client of %s disconnected: its request is cancelled", scope["path"])
                work.cancel()
            await asyncio.wait((work,))
            if not work.cancelled():
                work.result()
        finally:
            for task in (work, watch):
                task.cancel()


async def _pass_on(receive: Receive, messages: asyncio.Queue[Message]) -> None:
    """Hand the client's messages to the application; return when the client has disconnected."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        await messages.put(message)
