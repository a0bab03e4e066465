"""``CancelOnDisconnect`` with ASGI applications: forwarded messages and cancelled work."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from port_kit.runtime.serving import CancelOnDisconnect

SYNC = {"type": "http", "path": "/v1/videos/sync"}


class Client:
    """One connection: received messages, the last of them delayed, and sent messages."""

    def __init__(self, *messages: dict[str, Any], leaves_after: float | None = None) -> None:
        self.messages = list(messages)
        self.leaves_after = leaves_after
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        if self.messages:
            return self.messages.pop(0)
        await asyncio.sleep(3600 if self.leaves_after is None else self.leaves_after)
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


def body(text: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": text, "more_body": more}


async def reading(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the complete body."""
    text = b""
    while True:
        message = await receive()
        text += message["body"]
        if not message["more_body"]:
            break
    await send(text)


def run(app: Any, client: Client, scope: Any = SYNC) -> None:
    asyncio.run(asyncio.wait_for(CancelOnDisconnect(app)(scope, client.receive, client.send), 5))


def test_an_upload_arrives_whole_and_in_order() -> None:
    client = Client(body(b"a", True), body(b"b", True), body(b"c"))
    run(reading, client)
    assert client.sent == [b"abc"]


def test_work_stops_when_its_client_leaves() -> None:
    steps: list[str] = []

    async def working(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            steps.append("cancelled")
            await asyncio.sleep(0.01)  # the engine is told to abort
            steps.append("told")
            raise

    client = Client(body(b"x"), leaves_after=0.05)
    run(working, client)
    assert (steps, client.sent) == (["cancelled", "told"], [])


def test_a_client_that_leaves_in_the_middle_of_its_upload_is_noticed() -> None:
    client = Client(body(b"a", True), leaves_after=0.05)
    run(reading, client)
    assert client.sent == []


def test_an_error_of_the_application_is_its_own() -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError("broken")

    with pytest.raises(LookupError, match="broken"):
        run(failing, Client())


@pytest.mark.parametrize("scope", [{"type": "http", "path": "/v1/videos"}, {"type": "lifespan"}])
def test_everything_else_is_passed_on_as_it_is(scope: dict[str, str]) -> None:
    seen: list[Any] = []

    async def noting(*arguments: Any) -> None:
        seen.append(arguments)

    client = Client()
    run(noting, client, scope)
    assert seen == [(scope, client.receive, client.send)]
