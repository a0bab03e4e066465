"""Benchmarks of loading and of requests, on a CPU with tiny models: they run, and their figures are plausible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name: str, *options: str) -> dict[str, Any]:
    """Run a benchmark as a user does."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *options]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_request_is_timed_by_phase() -> None:
    result = run("end_to_end", "--tiny", "--rounds", "1", "--steps", "3")
    assert set(result["phases"]) >= {"encode_text", "encode_picture", "encode_voice", "decode_video", "vocode"}
    assert all(row["seconds"] > 0 or name == "to_host" for name, row in result["phases"].items())
    assert result["denoise"]["steps"] == 3 and result["denoise"]["seconds"] > 0
    assert result["load"]["weights_seconds"] > 0 and result["load"]["peak_gib"] > 0
    assert result["save"]["bytes"] > 0


def test_all_ways_of_loading_leave_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, to spare the imports that each way has in a run of the script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import load_cold
    from full_size import cached_share, drop_caches, make_component

    size = make_component(tmp_path / "transformer", "transformer", tiny=True, device="cpu", dtype="bfloat16", files=2)
    files = sorted((tmp_path / "transformer").glob("*.safetensors"))
    assert len(files) == 2 and 0 < sum(file.stat().st_size for file in files) - size < 1 << 17
    assert drop_caches(files)["by"] in ("drop_caches", "posix_fadvise")
    speeds = load_cold.disk(files, 1 << 20)
    assert speeds["bytes_per_s"] == speeds[speeds["best"]] > 0
    found = {way: load_cold.load(way, tmp_path, time.time()) for way in load_cold.WAYS}
    assert cached_share(files) > 0.9  # the kernel may reclaim pages
    assert len({one["checksum"] for one in found.values()}) == 1
    assert all(one["weights_s"] > 0 and one["first_step_s"] > 0 and one["peak_rss"] > 0 for one in found.values())
    row = load_cold.median([found["port"]], size, speeds["bytes_per_s"])
    assert row["weights_s"] == found["port"]["weights_s"] and row["of_disk"] > 0


@pytest.mark.slow
def test_cold_and_warm_loads_have_processes_of_their_own() -> None:
    result = run("load_cold", "--tiny", "--way", "port", "--way", "in_tree")
    assert result["same_weights"] and set(result["loads"]) == {"port", "in_tree"}
    for row in result["loads"].values():
        assert row["warm"]["cached_before"] == 1.0
        assert row["cold"]["to_first_step_s"] > row["cold"]["weights_s"] > 0
