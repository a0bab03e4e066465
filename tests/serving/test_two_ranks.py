"""A server on two ranks: a request that is cancelled during its only denoising step."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import httpx
import psutil
import pytest

from port_kit.testing.server import ApiServer
from tests.helpers import wait_until
from tests.serving.helpers import find_workers, serving
from tests.serving.hostile import LIMIT


def processor_seconds(process: psutil.Process) -> float:
    """Seconds that a process has computed."""
    times = process.cpu_times()
    return float(times.user + times.system)


@pytest.mark.slow
def test_a_request_ends_within_its_only_step(tmp_path: Path, load_test: ModuleType) -> None:
    """The only step has 15,000 video tokens; without a vote within it, the next request would wait for its end."""
    with serving("dreamid_omni", tmp_path, "--tensor-parallel-size", "2") as server:
        cancel_and_go_on(server, load_test)


def cancel_and_go_on(server: ApiServer, load_test: ModuleType) -> None:
    """Cancel a large request, and have a small one served."""
    http = httpx.Client(base_url=server.url, timeout=LIMIT)
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
