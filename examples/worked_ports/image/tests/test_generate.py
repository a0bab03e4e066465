"""The example script, through vLLM-Omni's engine on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "generate_retouch.py"
OPTIONS = ("--tiny", "--dtype", "float32", "--enforce-eager")


@pytest.mark.engine
def test_the_engine_makes_an_image(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    source = tmp_path / "picture.png"
    Image.new("RGB", (96, 64), (200, 30, 90)).save(source)
    command = [sys.executable, str(SCRIPT), "--model", str(model), "-o", str(target), *OPTIONS, "--image", str(source)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "original")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "48x32" in done.stdout
    assert target.stat().st_size > 500
