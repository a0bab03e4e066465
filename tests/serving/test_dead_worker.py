"""A worker that dies: its requests are answered, and the server ends instead of accepting more."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import httpx
import psutil

from port_kit.models.ovi.recipe import RECIPE
from tests.helpers import wait_until
from tests.serving.helpers import serving
from tests.serving.hostile import GOOD, LIMIT

#: Seconds within which the documentation promises the end of the server; a busy machine needs longer.
PROMISED, BUSY = 30, 4


def test_a_dead_worker_ends_the_server(tmp_path: Path) -> None:
    with serving(RECIPE, tmp_path, "--tensor-parallel-size", "2") as server:
        workers = [
            process
            for process in psutil.Process(server.pid).children(recursive=True)
            if "DiffusionWorker" in " ".join(process.cmdline())
        ]
        assert len(workers) == 2
        answers: list[httpx.Response] = []
        http = httpx.Client(base_url=server.url, timeout=LIMIT)
        long = {**GOOD, "num_inference_steps": "200"}
        work = threading.Thread(target=lambda: answers.append(http.post("/v1/videos/sync", data=long)))
        work.start()
        time.sleep(2)
        os.kill(workers[0].pid, signal.SIGKILL)
        work.join(LIMIT)
        assert answers[0].status_code in (500, 503), answers[0].text
        assert "engine" in answers[0].json()["error"]["message"].lower()
        wait_until(lambda: not server.is_alive(), PROMISED * BUSY, pause=0.2)
        assert "a worker of the engine has died; the server ends" in server.tail()
