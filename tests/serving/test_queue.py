"""The place of a job in the queue, and what its record says of its steps."""

from __future__ import annotations

from typing import Any

import pytest

from port_kit.runtime.progress import Progress
from port_kit.serving.queue import Queue, Snapshot, cancelled, name_of_request

FIELDS = ("queue_position", "step", "steps", "progress", "remaining_seconds")


def test_jobs_wait_in_the_order_of_their_arrival() -> None:
    queue = Queue()
    for job in "abc":
        queue.add(job)
    assert [queue.position(job, set()) for job in "abc"] == [1, 2, 3]
    assert [queue.position(job, {"a"}) for job in "abc"] == [0, 1, 2]
    assert [queue.position(job, {"a", "b"}) for job in "abc"] == [0, 0, 1], "a batch"
    queue.keep({"b", "c"})
    assert [queue.position(job, {"b"}) for job in "abc"] == [None, 0, 1]


def test_a_sync_request_is_before_the_jobs_that_came_later_while_it_waits() -> None:
    queue = Queue()
    queue.add("a")
    scope: dict[str, Any] = {}
    with queue.holding(name_of_request(scope)):
        queue.add("b")
        assert [queue.position(job, {"a"}) for job in "ab"] == [0, 2], "its form is still read"
        scope["state"]["request_metadata"] = type("Metadata", (), {"request_id": "video_sync-1"})
        assert queue.position("b", {"a"}) == 2
        assert queue.position("b", {"a", "video_sync-1"}) == 1
    assert queue.position("b", {"a"}) == 1


def _fields(status: str, found: Progress | None = None, now: float = 0.0, **record: Any) -> list[Any]:
    queue = Queue()
    queue.add("a")
    state = Snapshot(queue, set(), {} if found is None else {"a": found}, now=now)
    described = state.fields({"id": "a", "status": status, "progress": 0, **record})
    assert tuple(described) == FIELDS
    return list(described.values())


def test_a_record_tells_the_steps_and_the_time_that_is_left() -> None:
    assert _fields("queued") == [1, None, None, 0, None]
    assert _fields("in_progress") == [0, None, None, 0, None]
    assert _fields("in_progress", Progress()) == [0, None, None, 0, None], "its texts are encoded"
    assert _fields("in_progress", Progress(0, 50, 10.0, 10.0), 11.0) == [0, 0, 50, 0, None]
    running = Progress(12, 50, 10.0, 34.0)
    assert _fields("in_progress", running, 34.0) == [0, 12, 50, 24, 76.0]
    assert _fields("in_progress", running, 35.5) == [0, 12, 50, 24, 74.5]
    assert _fields("in_progress", running, 90.0) == [0, 12, 50, 24, 74.0], "a step slower than the mean"
    assert _fields("in_progress", Progress(50, 50, 10.0, 34.0), 99.0) == [0, 50, 50, 99, 0.0], "its video is decoded"


def test_a_finished_job_has_no_place() -> None:
    last = Progress(50, 50, 10.0, 34.0)
    assert _fields("completed", last, progress=100, num_inference_steps=50) == [None, 50, 50, 100, None]
    assert _fields("failed", last) == [None, None, None, 0, None]


def test_a_cancelled_job_keeps_its_steps() -> None:
    record = {"id": "a", "status": "in_progress", **dict(zip(FIELDS, [0, 12, 50, 24, 76.0], strict=True))}
    found = cancelled(record)
    assert found["status"] == "cancelled" and found["completed_at"] > 0
    assert [found[name] for name in FIELDS] == [None, 12, 50, 24, None]


@pytest.mark.parametrize(("step", "percent"), [(0, 0), (1, 0), (2, 1), (199, 99), (200, 99)])
def test_percents_are_rounded_down(step: int, percent: int) -> None:
    assert Progress(step, 200).percent == percent
