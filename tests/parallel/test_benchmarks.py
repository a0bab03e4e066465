"""The benchmarks of parallel execution on CPU processes: they run and print one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.slow


def run(name: str, *options: str) -> dict[str, Any]:
    """Run a benchmark as a user does."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *options]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_layouts_are_measured_and_agree_with_one_rank() -> None:
    layouts = ("ulysses2", "tp2", "hsdp2xcfg2")
    options = [word for layout in layouts for word in ("--layout", layout)]
    result = run("parallel_scaling", "--tiny", "--rounds", "1", *options)
    assert list(result["layouts"]) == ["single", *layouts]
    for layout in layouts:
        row = result["layouts"][layout]
        assert row["within_tolerance"] and row["relative_error"] <= 1e-5
        assert row["seconds"] > 0 and max(row["communication"]) > 0
    assert result["layouts"]["hsdp2xcfg2"]["weight_share"] < 0.55


def test_the_cache_is_measured() -> None:
    result = run("cache_speed", "--steps", "8", "--threshold", "0.9")
    assert result["blocks_computed"] < 1
    assert 0 < result["relative_error"]["video"] < 0.5


def test_layouts_of_mova_are_measured_and_agree_with_one_rank() -> None:
    layouts = ("hsdp2", "cfg2", "ulysses2")
    options = [word for layout in layouts for word in ("--layout", layout)]
    result = run("mova_scaling", "--tiny", "--rounds", "1", "--warm-up", "0", *options)
    assert list(result["layouts"]) == ["single", *layouts]
    for layout in layouts:
        row = result["layouts"][layout]
        assert row["within_tolerance"] and row["seconds"] > 0 and max(row["communication"]) > 0
    assert result["layouts"]["hsdp2"]["weight_share"] < 0.55
