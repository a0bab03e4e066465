"""MOVA's example scripts: the tiny download, videos with audio from a first frame through vLLM-Omni's engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from port_kit.models.mova import PORT
from port_kit.pipeline.media import measure_mp4, write_mp4
from port_kit.testing.forkserver import run_forked

EXAMPLE = Path(__file__).parents[2] / "examples" / "offline_inference" / "mova"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, as the script downloads it."""
    folder = tmp_path_factory.mktemp("models") / "mova"
    command = [sys.executable, str(EXAMPLE / "download_mova.py"), "--tiny", "--output-dir", str(folder)]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1,localhost"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == PORT.class_name
    return folder


def generate(model: Path, clip: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Run the script with the sizes of the tiny model."""
    command = [sys.executable, str(EXAMPLE / "generate_mova.py"), "--model", str(model), "--tiny", "--enforce-eager"]
    return run_forked([*command, "--output", str(clip), *map(str, options)], timeout=600)


def frames_of(path: Path) -> np.ndarray:
    """Return the frames (F, H, W, 3) of a clip."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)


def test_segments_continue_a_video_with_audio_from_a_first_frame(model: Path, tmp_path: Path) -> None:
    """Two requests in one file: 17 frames and 0.72 s of audio each, the second one from the last frame of the first."""
    Image.new("RGB", (130, 50), (90, 120, 60)).save(tmp_path / "first.png")
    clip = tmp_path / "out.mp4"
    done = generate(model, clip, "--image", tmp_path / "first.png", "--segments", 2)
    assert done.returncode == 0, done.stderr[-4000:]
    found = measure_mp4(clip)
    assert (found.width, found.height, found.frames) == (96, 64, 2 * 17 - 1)
    assert found.sample_rate == 48_000 and found.peak > 0
    assert abs(found.audio_seconds - found.video_seconds) <= 1 / 24
    assert frames_of(clip)[17:].std() > 0


@pytest.mark.slow
def test_a_clip_is_continued_from_its_last_frame(model: Path, tmp_path: Path) -> None:
    """No picture is needed, and the clip's last frame matters."""
    made = []
    for name, shade in (("dark", 40), ("light", 220)):
        write_mp4(tmp_path / f"{name}.mp4", np.full((5, 64, 96, 3), shade, np.uint8), fps=24)
        clip = tmp_path / f"after_{name}.mp4"
        done = generate(model, clip, "--continue-from", tmp_path / f"{name}.mp4")
        assert done.returncode == 0, done.stderr[-4000:]
        made.append(frames_of(clip))
    assert made[0].shape == made[1].shape == (17, 64, 96, 3)
    assert not np.array_equal(*made)
