"""MOVA's example scripts: the tiny download, and a video with audio from a first frame through vLLM-Omni's engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from port_kit.models.mova import PORT
from port_kit.pipeline.media import measure_mp4
from port_kit.testing.forkserver import run_forked

EXAMPLE = Path(__file__).parents[2] / "examples" / "offline_inference" / "mova"


def test_the_tiny_model_makes_a_video_with_audio_from_a_first_frame(tmp_path: Path) -> None:
    model, clip = tmp_path / "mova", tmp_path / "out.mp4"
    command = [sys.executable, str(EXAMPLE / "download_mova.py"), "--tiny", "--output-dir", str(model)]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1,localhost"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((model / "model_index.json").read_text())["_class_name"] == PORT.class_name
    Image.new("RGB", (130, 50), (90, 120, 60)).save(tmp_path / "first.png")
    command = [sys.executable, str(EXAMPLE / "generate_mova.py"), "--model", str(model), "--tiny", "--enforce-eager"]
    command += ["--image", str(tmp_path / "first.png"), "--output", str(clip)]
    done = run_forked(command, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = measure_mp4(clip)
    assert (found.width, found.height, found.frames) == (96, 64, 17)
    assert found.sample_rate == 48_000 and found.peak > 0
