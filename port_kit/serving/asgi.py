"""Types of ASGI, and the messages that the gateway sends by itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from port_kit.escape import escape_control_chars, shortened

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Characters of the message of an error; those of the kit are far shorter, those of other libraries may be any.
MAX_MESSAGE = 2000
#: Time in which a refused client may finish its body.
_LINGER_SECONDS = 20.0
#: ``type`` of an error by status, as in the APIs of OpenAI and vLLM.
_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    408: "TimeoutError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
}


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: for the client.
        headers: further headers of the answer.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}


def error_body(status: int, message: str) -> bytes:
    """Return the body of an error, the same form for all errors of the server: printable, and of limited length."""
    message = shortened(escape_control_chars(message, keep="\n"), MAX_MESSAGE)
    kind = _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


class Incoming:
    """Wraps ``receive`` of one request.

    Attributes:
        is_complete: True once the body has arrived, or the client has left.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.is_complete = False

    async def __call__(self) -> Message:
        """Return the next message of the client."""
        message = await self._receive()
        self.is_complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message


async def send_json(send: Send, value: Any) -> None:
    """Send a value with status 200."""
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(value).encode()})


async def refuse(receive: Incoming, send: Send, refusal: Refusal) -> None:
    """Send a refusal, and close the connection.

    A client that is still sending its body gets a while to notice the answer; its data are thrown away. A connection
    that is closed at once would be reset, and the answer lost.
    """
    body = error_body(refusal.status, refusal.message)
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (headers | refusal.headers).items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": lines})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while not receive.is_complete:
                await receive()
    await send({"type": "http.response.body", "body": b""})


def header(scope: Scope, name: str) -> str | None:
    """Return a header of a request, None if it has none of this name."""
    wanted = name.lower().encode()
    for key, value in scope["headers"]:
        if key.lower() == wanted:
            return str(value.decode("latin-1"))
    return None
