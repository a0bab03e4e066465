"""Order of the requests that wait for the engine, and what a job's record says of it and of its steps.

The engine starts requests in the order of their arrival. Sync requests and jobs wait in one queue.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from port_kit.runtime.progress import FOLDER, Progress, read
from port_kit.serving.asgi import Scope

WAITING, RUNNING = "queued", "in_progress"
#: Status of a job that was deleted before it was finished; vLLM-Omni has none.
CANCELLED = "cancelled"

#: What the engine appends to the id of a request.
_SUFFIX = re.compile(r"-[0-9a-f]{8}$")
#: Returns the id of a request, empty until it has one.
Name = Callable[[], str]


class Queue:
    """Unfinished requests in the order of their arrival."""

    def __init__(self) -> None:
        self._jobs: dict[str, int] = {}
        self._sync: dict[int, Name] = {}
        self._arrived = 0

    def add(self, job: str) -> None:
        """Append a job."""
        self._jobs[job] = self._next()

    @contextmanager
    def holding(self, name: Name) -> Iterator[None]:
        """Append a sync request while it is served."""
        number = self._next()
        self._sync[number] = name
        try:
            yield
        finally:
            del self._sync[number]

    def keep(self, unfinished: Container[str]) -> None:
        """Remove all jobs but these."""
        self._jobs = {job: number for job, number in self._jobs.items() if job in unfinished}

    def position(self, job: str, started: Collection[str]) -> int | None:
        """Return a job's place: 0 if it runs, 1 if it is the next one; None if it is not in the queue.

        Args:
            job: its id.
            started: ids of requests that do not wait any more.
        """
        own = self._jobs.get(job)
        if own is None:
            return None
        if job in started:
            return 0
        jobs = sum(number < own and other not in started for other, number in self._jobs.items())
        return 1 + jobs + sum(number < own and name() not in started for number, name in self._sync.items())

    def _next(self) -> int:
        self._arrived += 1
        return self._arrived


@dataclass(frozen=True)
class Snapshot:
    """State of the engine at one time.

    Attributes:
        queue: all unfinished requests.
        started: ids of requests that do not wait any more.
        progress: of requests by id.
        unfinished: vLLM-Omni's records of jobs that wait or run, by id.
        now: the time.
    """

    queue: Queue
    started: Collection[str] = frozenset()
    progress: Mapping[str, Progress] = field(default_factory=dict)
    unfinished: Mapping[str, Any] = field(default_factory=dict)
    now: float = 0.0

    def fields(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a job's record that tell its place and its steps.

        Args:
            record: vLLM-Omni's, with the settings of the request.
        """
        position, step, steps, remaining = None, None, None, None
        percent = record.get("progress", 0)
        if record["status"] in (WAITING, RUNNING):
            found = self.progress.get(record["id"], Progress())
            position = 0 if record["status"] == RUNNING else self.queue.position(record["id"], self.started)
            step, steps = (found.step, found.steps) if found.steps else (None, None)
            percent, remaining = found.percent, found.remaining(self.now)
        elif record["status"] == "completed":
            step = steps = record.get("num_inference_steps")
        return {
            "queue_position": position,
            "step": step,
            "steps": steps,
            "progress": percent,
            "remaining_seconds": None if remaining is None else round(remaining, 2),
        }


async def look(queue: Queue) -> Snapshot:
    """Return the present state, and remove finished jobs from the queue."""
    from vllm_omni.entrypoints.openai.stores import VIDEO_STORE

    records = await VIDEO_STORE.list_values()
    unfinished = {record.id: record for record in records if record.status in (WAITING, RUNNING)}
    queue.keep(unfinished)
    progress = {_SUFFIX.sub("", name): found for name, found in read(os.environ.get(FOLDER)).items()}
    started = {job for job, record in unfinished.items() if record.status == RUNNING} | set(progress)
    return Snapshot(queue, started, progress, unfinished, time.monotonic())


def name_of_request(scope: Scope) -> Name:
    """Return a function that returns the id which vLLM-Omni gives a sync request."""
    state = scope.setdefault("state", {})

    def name() -> str:
        return str(getattr(state.get("request_metadata"), "request_id", ""))

    return name


def cancelled(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a job that was cancelled; it keeps the steps that were done."""
    changed = {"status": CANCELLED, "queue_position": None, "remaining_seconds": None}
    return {**record, **changed, "completed_at": int(time.time())}
