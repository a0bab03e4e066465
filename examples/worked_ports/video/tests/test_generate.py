"""The example script, through vLLM-Omni's engine on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "generate_driftwood.py"
OPTIONS = ("--tiny", "--dtype", "float32", "--enforce-eager")


@pytest.mark.engine
def test_the_engine_makes_a_video(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    command = [sys.executable, str(SCRIPT), "--model", str(model), "-o", str(target), *OPTIONS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "original")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "48x32" in done.stdout
    assert target.stat().st_size > 500
