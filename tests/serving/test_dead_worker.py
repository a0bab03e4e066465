"""A server on two ranks: a request that is cancelled during its only denoising step, and a worker that dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from types import ModuleType

import httpx
import psutil
import pytest

from port_kit.testing.server import ApiServer
from tests.helpers import wait_until
from tests.serving.helpers import serving
from tests.serving.hostile import LIMIT, refused

#: Seconds within which the documentation promises the end of the server; a busy machine needs longer.
PROMISED, BUSY = 30, 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with serving("dreamid_omni", tmp_path_factory.mktemp("ranks"), "--tensor-parallel-size", "2") as running:
        yield running


@pytest.fixture(scope="module")
def http(server: ApiServer) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=LIMIT)


def find_workers(server: ApiServer) -> list[psutil.Process]:
    """The two workers of the server's engine."""
    children = psutil.Process(server.pid).children(recursive=True)
    workers = [process for process in children if "DiffusionWorker" in " ".join(process.cmdline())]
    assert len(workers) == 2
    return workers


def processor_seconds(process: psutil.Process) -> float:
    """Seconds that a process has computed."""
    times = process.cpu_times()
    return float(times.user + times.system)


def test_a_request_ends_within_its_only_step(server: ApiServer, http: httpx.Client, load_test: ModuleType) -> None:
    """The only step has 15,000 video tokens; without a vote within it, the next request would wait for its end."""
    files = load_test.references()
    large = {**load_test.GOOD, "width": "704", "height": "704"}
    workers = find_workers(server)
    before = [processor_seconds(worker) for worker in workers]
    job = http.post("/v1/videos", data=large, files=files).json()["id"]
    # all that precedes the step takes a second
    both = list(zip(workers, before, strict=True))
    wait_until(lambda: all(processor_seconds(one) > begun + 4 for one, begun in both), LIMIT, pause=0.1)
    assert http.delete(f"/v1/videos/{job}").json()["deleted"]
    assert http.post("/v1/videos/sync", data=load_test.GOOD, files=files).status_code == 200
    log = server.log.read_text(encoding="utf-8", errors="replace")
    *bars, last = log.partition('"POST /v1/videos HTTP')[2].split("0%|          | 0/1")
    assert len(bars) >= 2 and not any("1/1 [" in bar for bar in bars), "the cancelled step did not end"
    assert "1/1 [" in last


def test_a_dead_worker_ends_the_server(server: ApiServer, http: httpx.Client, load_test: ModuleType) -> None:
    """Runs last: the server does not survive it."""
    workers = find_workers(server)
    answers: list[httpx.Response] = []
    files = load_test.references()
    work = threading.Thread(
        target=lambda: answers.append(http.post("/v1/videos/sync", data=load_test.LONG, files=files))
    )
    work.start()
    time.sleep(2)
    os.kill(workers[0].pid, signal.SIGKILL)
    started = time.monotonic()
    work.join(LIMIT)
    refused(answers[0], "engine", status=answers[0].status_code)
    assert answers[0].status_code in (500, 503)
    print(f"answered {time.monotonic() - started:.1f} s after the death of a worker")
    wait_until(lambda: not server.is_alive(), PROMISED * BUSY, pause=0.2)
    print(f"ended {time.monotonic() - started:.1f} s after the death of a worker")
    assert server.exit_code == 1
    assert "a worker of the engine has died; the server ends" in server.tail()
