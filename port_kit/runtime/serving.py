"""Middleware for vLLM-Omni's API server, enabled with the server's option::

    vllm serve MODEL --omni --middleware port_kit.runtime.serving.CancelOnDisconnect

``POST /v1/videos/sync`` otherwise continues to compute after its client disconnects.
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

#: Paths whose result exists only in the response.
PATHS = frozenset({"/v1/videos/sync"})


class CancelOnDisconnect:
    """ASGI middleware that cancels a request to :data:`PATHS` if its client disconnects.

    The endpoint receives ``asyncio.CancelledError``. vLLM-Omni's client then aborts the request in the engine, and a
    pipeline that supports cancellation stops before its next denoising step. Jobs (``POST /v1/videos``) outlive the
    connection; cancel them with ``DELETE``.

    Args:
        app: wrapped application, passed by vLLM.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http" or scope["path"] not in PATHS:
            await self.app(scope, receive, send)
            return
        # one message at a time, so that uploads are subject to back-pressure
        messages: asyncio.Queue[Message] = asyncio.Queue(maxsize=1)
        work = asyncio.ensure_future(self.app(scope, messages.get, send))
        watch = asyncio.ensure_future(_pass_on(receive, messages))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                logger.info("client of %s disconnected; request cancelled", scope["path"])
                work.cancel()
            await asyncio.wait((work,))
            if not work.cancelled():
                work.result()
        finally:
            for task in (work, watch):
                task.cancel()


async def _pass_on(receive: Receive, messages: asyncio.Queue[Message]) -> None:
    """Forward the client's messages to the application; return after a disconnect."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        await messages.put(message)
