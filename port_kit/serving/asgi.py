"""Types of ASGI, and the messages that the gateway sends by itself."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

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
    """Return the body of an error, the same form for all errors of the server."""
    kind = _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


async def respond(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    """Send a complete JSON answer."""
    lines = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


async def refuse(send: Send, refusal: Refusal) -> None:
    """Send a refusal, and close the connection: what remains of the request is not read."""
    headers = {"connection": "close", **refusal.headers}
    await respond(send, refusal.status, error_body(refusal.status, refusal.message), headers)


def header(scope: Scope, name: str) -> str | None:
    """Return a header of a request, None if it has none of this name."""
    wanted = name.lower().encode()
    for key, value in scope["headers"]:
        if key.lower() == wanted:
            return str(value.decode("latin-1"))
    return None
