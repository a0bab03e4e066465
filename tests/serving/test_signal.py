"""The end of the server of Ovi after a signal. Its name makes this the last module of its group."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import httpx

from port_kit.runtime.progress import MEMORY
from tests.helpers import wait_until
from tests.serving.hostile import DRAIN_SECONDS, GOOD, Target, refused


def test_the_log_has_neither_refusals_nor_prompts(target: Target) -> None:
    log = target.server.log.read_text(encoding="utf-8", errors="replace")
    assert "InputError" not in log and "secret script" not in log


def test_a_signal_ends_the_server_within_the_stated_time(target: Target) -> None:
    answers: list[httpx.Response] = []
    long = {**GOOD, "num_inference_steps": "200"}
    work = threading.Thread(target=lambda: answers.append(target.sync(long)))
    work.start()
    time.sleep(2)
    started = time.monotonic()
    assert list(Path(MEMORY).glob(f"port_kit_progress_{target.server.pid}_*/rank_0.json"))
    os.kill(target.server.pid, signal.SIGTERM)
    wait_until(lambda: target.bob.post("/v1/videos/sync", data=GOOD).status_code == 503, DRAIN_SECONDS)
    work.join(DRAIN_SECONDS + 60)
    refused(answers[0], "being stopped", status=503)
    wait_until(lambda: not target.server.is_alive(), 60, pause=0.1)
    assert DRAIN_SECONDS - 1 < time.monotonic() - started
    assert not list(Path(MEMORY).glob(f"port_kit_progress_{target.server.pid}_*"))
