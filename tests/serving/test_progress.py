"""Place, steps and cancellation of jobs, from the record and in the examples' client."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from tests.helpers import wait_until
from tests.serving.helpers import EXAMPLES
from tests.serving.hostile import ALICE, LIMIT, Target, refused

CLIENT = [sys.executable, str(EXAMPLES / "ovi" / "client.py"), "--prompt", "rain"]
STEPS = 200
#: Steps that a cancelled job may make after it was deleted, and seconds for the answers on a busy machine.
EXTRA_STEPS, SLACK = 2, 3.0


def _record(target: Target, job: str) -> dict[str, Any]:
    response = target.alice.get(f"/v1/videos/{job}")
    assert response.status_code == 200, response.text
    return dict(response.json())


def _wait_for_step(target: Target, job: str, step: int) -> dict[str, Any]:
    wait_until(lambda: (_record(target, job)["step"] or 0) >= step, LIMIT, pause=0.05)
    return _record(target, job)


def _cancel(target: Target, job: str) -> None:
    answer = target.alice.delete(f"/v1/videos/{job}").json()
    assert answer == {"id": job, "object": "video.deleted", "deleted": True, "status": "cancelled"}


def test_a_job_waits_makes_its_steps_and_is_completed(target: Target) -> None:
    long, short, last = (target.submit({"num_inference_steps": str(steps)}) for steps in (STEPS, 12, 1))
    found = _wait_for_step(target, long, 2)
    assert (found["status"], found["queue_position"], found["steps"]) == ("in_progress", 0, STEPS)
    assert found["progress"] == 100 * found["step"] // STEPS and found["remaining_seconds"] > 0
    waiting = [_record(target, job) for job in (short, last)]
    assert [one["queue_position"] for one in waiting] == [1, 2]
    assert all((one["status"], one["step"], one["steps"]) == ("queued", None, None) for one in waiting)
    refused(target.bob.get(f"/v1/videos/{long}"), "not found", status=404)
    listed = {one["id"]: one["queue_position"] for one in target.alice.get("/v1/videos").json()["data"]}
    assert (listed[long], listed[short], listed[last]) == (0, 1, 2)

    cancelled = _record(target, long)
    _cancel(target, long)
    started = time.monotonic()
    wait_until(lambda: _record(target, short)["queue_position"] == 0, LIMIT, pause=0.02)
    step_seconds = cancelled["remaining_seconds"] / (STEPS - cancelled["step"])
    assert time.monotonic() - started < EXTRA_STEPS * step_seconds + SLACK < cancelled["remaining_seconds"]

    seen: list[dict[str, Any]] = []
    while not seen or seen[-1]["status"] == "in_progress":
        seen.append(_record(target, short))
    steps = [one["step"] for one in seen if one["step"] is not None]
    assert steps == sorted(steps) and len(set(steps)) > 3 and steps[-1] == 12, steps
    assert all(one["remaining_seconds"] is not None for one in seen if one["step"] and one["status"] == "in_progress")
    end = seen[-1]
    assert (end["status"], end["queue_position"], end["progress"]) == ("completed", None, 100)
    assert end["remaining_seconds"] is None
    for job in (short, last):
        assert target.alice.delete(f"/v1/videos/{job}").json()["deleted"]

    after = _record(target, long)
    assert (after["status"], after["queue_position"], after["remaining_seconds"]) == ("cancelled", None, None)
    assert cancelled["step"] <= after["step"] < STEPS
    assert "cancelled" in {one["status"] for one in target.alice.get("/v1/videos").json()["data"]}
    refused(target.bob.get(f"/v1/videos/{long}"), "not found", status=404)
    refused(target.bob.delete(f"/v1/videos/{long}"), "not found", status=404)
    refused(target.alice.get(f"/v1/videos/{long}/content"), status=404)
    assert target.alice.delete(f"/v1/videos/{long}").json()["deleted"]
    refused(target.alice.get(f"/v1/videos/{long}"), status=404)


def test_a_waiting_job_is_cancelled_and_the_others_move_up(target: Target) -> None:
    """A sync request has a place, too."""
    running = target.submit({"num_inference_steps": str(STEPS)})
    _wait_for_step(target, running, 1)
    sync = threading.Thread(target=target.sync)
    sync.start()
    jobs: list[str] = []

    def is_behind_the_sync_request() -> bool:
        jobs.append(target.submit())
        if _record(target, jobs[-1])["queue_position"] == 2:
            return True
        _cancel(target, jobs[-1])
        return False

    wait_until(is_behind_the_sync_request, 60, pause=0.1)
    first, second = jobs[-1], target.submit()
    assert _record(target, second)["queue_position"] == 3
    _cancel(target, first)
    assert _record(target, second)["queue_position"] == 2
    assert (_record(target, first)["status"], _record(target, first)["step"]) == ("cancelled", None)
    _cancel(target, second)
    _cancel(target, running)
    sync.join(LIMIT)
    for job in (running, second, *jobs):
        target.alice.delete(f"/v1/videos/{job}")


def _client(target: Target, steps: int, *options: str) -> subprocess.Popen[str]:
    line = [*CLIENT, "--server", target.server.url, "--num-inference-steps", str(steps), *options]
    environment = {**os.environ, "API_KEY": ALICE, "NO_PROXY": "127.0.0.1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=environment, preexec_fn=_hear_interrupts, **pipes)


def _hear_interrupts() -> None:
    """Undo what a shell does for its background jobs, one of which may be this test: they ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_client_shows_the_steps_and_ctrl_c_cancels_the_job(target: Target, tmp_path: Any) -> None:
    before = target.submit({"num_inference_steps": str(STEPS)})
    client = _client(target, STEPS, "-o", str(tmp_path / "none.mp4"))
    assert client.stderr is not None
    lines = iter(client.stderr.readline, "")
    assert next(lines) == "queued 1st\n"
    _cancel(target, before)
    step = next(line for line in lines if line.startswith("step"))
    assert re.fullmatch(rf"step \d+/{STEPS}(, \d+ s left)?\n", step)
    assert any("s left" in line for line in itertools.islice(lines, 3))
    client.send_signal(signal.SIGINT)
    rest = client.communicate(timeout=60)[1]
    assert client.returncode == 130 and rest.endswith("cancelled\n") and "Traceback" not in rest, rest
    newest = target.alice.get("/v1/videos").json()["data"][0]
    assert (newest["status"], newest["steps"]) == ("cancelled", STEPS)
    assert not (tmp_path / "none.mp4").exists()
    for job in (before, newest["id"]):
        target.alice.delete(f"/v1/videos/{job}")
