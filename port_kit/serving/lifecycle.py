"""State of a server: requests in flight, a dead engine, the end after a signal."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from port_kit.serving.asgi import Refusal
from port_kit.serving.limits import Limits, option
from port_kit.serving.process import end_after_death

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
#: Consecutive failed checks after which the engine counts as dead: a stage that restarts may miss one.
_FAILURES = 2
#: Bounds of the time after which a refused client should ask again, in seconds.
_RETRY = (1, 600)


class Lifecycle:
    """Admits requests, and ends the server when its engine has died.

    Args:
        limits: of the server.

    Attributes:
        ending: None while requests are served; otherwise why no more are, for clients.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._tasks: set[asyncio.Task[Any]] = set()
        self._admitted = 0
        self._finished: deque[float] = deque(maxlen=16)
        self._watcher: asyncio.Task[None] | None = None
        self._is_healthy = True
        self.ending: str | None = None

    # -- requests ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse a request if the server ends.

        Raises:
            Refusal: status 503.
        """
        if self.ending is not None:
            raise Refusal(503, self.ending, {"retry-after": str(_RETRY[0])})

    @contextmanager
    def admitted(self, jobs: int) -> Iterator[None]:
        """Count a request from its first byte to its answer.

        Args:
            jobs: jobs that wait or run.

        Raises:
            Refusal: status 429; the queue is full.
        """
        self.check()
        waiting = jobs + self._admitted
        if waiting >= self._limits.max_queue:
            raise Refusal(
                429,
                f"{waiting} requests wait or run, as many as this server takes ({option('max_queue')})",
                {"retry-after": str(self._seconds_per_request())},
            )
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1
            self._finished.append(time.monotonic())

    def _seconds_per_request(self) -> int:
        """Return the mean time between two of the last answers: the time until a place becomes free."""
        times = self._finished
        mean = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
        return min(max(math.ceil(mean), _RETRY[0]), _RETRY[1])

    @contextmanager
    def tracked(self, task: asyncio.Task[Any]) -> Iterator[None]:
        """Cancel a task if it still runs when the server ends."""
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    # -- the end ----------------------------------------------------------------------------------------------------

    def start(self, state: Any) -> None:
        """Watch the engine of a server.

        Args:
            state: of vLLM's application, with ``engine_client`` and ``server`` (uvicorn's).
        """
        client = state.engine_client
        owner = getattr(client, "_wrapped", client)
        owner.shutdown = self._draining(owner.shutdown)
        self._watcher = asyncio.create_task(self._watch(client, state.server))

    def _draining(self, shutdown: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the function that stops the engine: running requests get a while to finish.

        vLLM's launcher calls it in a thread of its own, after SIGTERM and SIGINT.
        """

        def run(*arguments: Any, **keywords: Any) -> Any:
            if self.ending is None:
                self.ending = "the server is being stopped"
                deadline = time.monotonic() + self._limits.drain_seconds
                logger.info("stopping; %d requests get up to %g s", len(self._tasks), self._limits.drain_seconds)
                while self._tasks and self._is_healthy and time.monotonic() < deadline:
                    time.sleep(0.05)
            return shutdown(*arguments, **keywords)

        return run

    async def _watch(self, client: Any, server: Any) -> None:
        failures = 0
        while not server.should_exit:
            await asyncio.sleep(_POLL_SECONDS)
            failures = 0 if await _is_healthy(client) else failures + 1
            self._is_healthy = failures < _FAILURES
            if not self._is_healthy and self.ending is None:
                self.ending = "the engine of this server has died; the server ends"
                logger.critical("a worker of the engine has died; the server ends. Its own message is above.")
                end_after_death()
                server.should_exit = True
        for task in list(self._tasks):
            task.cancel()


async def _is_healthy(client: Any) -> bool:
    try:
        await client.check_health()
    except Exception:  # the engine reports its death by errors of several classes
        return False
    return True
