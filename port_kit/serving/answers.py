"""Answers of vLLM-Omni's server on their way to the client: one form of errors, and a limit of time."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

from port_kit.serving.asgi import Message, Send, error_body

#: Rewrites an answer of JSON; receives the status and the value.
Rewrite = Callable[[int, Any], Any]

#: Lines of pydantic's messages that tell a client nothing.
_LINKS = re.compile(r"\s*For further information visit \S+")


class StalledError(Exception):
    """The client does not take its answer."""


class Answer:
    """Wraps ``send`` of one request.

    Args:
        send: of the server.
        idle_seconds: time in which the client must take each part.

    Attributes:
        rewrite: applied to answers of JSON with a status below 400 and to records of failed jobs; None for none.
        status: of the answer, 0 before it begins.
        has_started: True as soon as the client may have received a part.
    """

    def __init__(self, send: Send, idle_seconds: float) -> None:
        self._send = send
        self._idle_seconds = idle_seconds
        self._start: Message | None = None
        self._body = bytearray()
        self.rewrite: Rewrite | None = None
        self.status = 0
        self.has_started = False

    async def __call__(self, message: Message) -> None:
        """Send a message of the application, or hold it back until its body is complete."""
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            if _is_json(message):
                self._start = message
                return
            self.has_started = True
        elif message["type"] == "http.response.body" and self._start is not None:
            self._body += message.get("body", b"")
            if message.get("more_body", False):
                return
            await self._finish(self._start)
            return
        await self._pass(message)

    async def _finish(self, start: Message) -> None:
        """Send the answer that was held back."""
        status = int(start["status"])
        body = _rewritten(status, bytes(self._body), self.rewrite)
        dropped = (b"content-length", b"content-type")
        headers = [pair for pair in start["headers"] if pair[0].lower() not in dropped]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        self.has_started = True
        await self._pass({**start, "headers": headers})
        await self._pass({"type": "http.response.body", "body": body})

    async def _pass(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._idle_seconds):
                await self._send(message)
        except TimeoutError as error:
            raise StalledError from error


def _is_json(start: Message) -> bool:
    """Return True for answers of JSON, and for errors, which become JSON."""
    kinds = [value for name, value in start["headers"] if name.lower() == b"content-type"]
    return bool(kinds and kinds[0].startswith(b"application/json")) or start["status"] >= 400


def _rewritten(status: int, body: bytes, rewrite: Rewrite | None) -> bytes:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if status < 400:
        return body if value is None or rewrite is None else json.dumps(rewrite(status, value)).encode()
    if isinstance(value, dict) and {"id", "status", "error"} <= set(value):  # a failed job's record
        return body if rewrite is None else json.dumps(rewrite(status, value)).encode()
    return error_body(status, _message(value, body))


def _message(value: Any, body: bytes) -> str:
    """Return the message of an error in any of the forms that vLLM, FastAPI and uvicorn use."""
    found: Any = value
    for name in ("error", "detail", "message"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    if isinstance(found, list):
        found = "; ".join(str(entry.get("msg", entry)) if isinstance(entry, dict) else str(entry) for entry in found)
    text = found if isinstance(found, str) else body.decode(errors="replace")
    if _LINKS.search(text):
        text = " ".join(_LINKS.sub("", text).split())
    return text.strip() or "the request failed"
