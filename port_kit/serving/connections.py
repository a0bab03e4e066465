"""Limits of a connection before its request reaches the gateway: time and size of a request's head, and their number.

uvicorn's HTTP protocol has none of these. Bodies and answers are limited by the gateway.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any, cast

from port_kit.serving.asgi import Scope, error_body

#: Bytes of the request line and all headers.
MAX_HEAD = 2**16
#: Open connections as a share of the files that the process may open.
_SHARE_OF_FILES = 0.5
#: Key of a request's scope: a function that closes its connection at once.
_ABORT = "port_kit.abort"


def limit_connections(config: Any, head_seconds: float) -> None:
    """Make a server limit the connections that it accepts from now on.

    Args:
        config: ``uvicorn.Config``, loaded, whose HTTP protocol is that of httptools.
        head_seconds: time in which the head of a request must arrive.
    """
    most = int(resource.getrlimit(resource.RLIMIT_NOFILE)[0] * _SHARE_OF_FILES)
    members = {"head_seconds": head_seconds, "max_connections": most}
    config.http_protocol_class = type("LimitedProtocol", (_Limited, config.http_protocol_class), members)


def abort(scope: Scope) -> None:
    """Close the connection of a request at once; what the client has not read yet is lost."""
    if _ABORT in scope:
        scope[_ABORT]()


class _Limited:
    """Extension of ``uvicorn.protocols.http.httptools_impl.HttpToolsProtocol``.

    Attributes:
        head_seconds: time in which the head of a request must arrive.
        max_connections: number of open connections of the server.
    """

    head_seconds: float
    max_connections: int
    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin a connection, or close it if there are too many."""
        self._base.connection_made(transport)
        if len(cast(Any, self).connections) > self.max_connections:
            transport.abort()
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        self._end_head()
        self._base.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse a part of a request; close the connection if its head is too large."""
        self._base.data_received(data)
        if self._timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self._end_head()
                self.send_400_response(f"The head of a request has more than {MAX_HEAD} bytes.")

    def on_message_begin(self) -> None:
        """Begin the head of a request."""
        self._base.on_message_begin()
        protocol = cast(Any, self)
        protocol.scope[_ABORT] = protocol.transport.abort
        self._begin_head()

    def on_headers_complete(self) -> None:
        """Begin a request."""
        self._end_head()
        self._base.on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that is no HTTP."""
        transport: asyncio.Transport = cast(Any, self).transport
        body = error_body(400, msg)
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head.encode() + body)
        transport.close()

    @property
    def _base(self) -> Any:
        return super()

    def _begin_head(self) -> None:
        self._end_head()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self.head_seconds, cast(Any, self).transport.abort)
        self._head_bytes = 0

    def _end_head(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
