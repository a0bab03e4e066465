"""Clips of the tiny Ovi through ``port-kit generate``: segments, a repeated clip, a file of prompts with a bad line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner

from port_kit.cli import main
from port_kit.pipeline.media import measure_mp4, write_mp4
from port_kit.testing.forkserver import run_forked

pytestmark = pytest.mark.slow

LINES = (
    # an image of 64x96 pixels alone would have the size 64x64
    {"prompt": "rain on a roof", "segments": 3, "seed": 3, "height": 64, "width": 104},
    {"prompt": "a bad request", "num_inference_steps": 0},
    {"prompt": "wind", "seed": 4},
    {"prompt": "sun", "seed": 5, "continue_from": "start.mp4"},
)
FPS = 24


def generate(model: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Run ``port-kit generate ovi``."""
    command = [sys.executable, "-m", "port_kit", "generate", "ovi", "--model", str(model), *map(str, options)]
    return run_forked(command, timeout=600)


def batch(model: Path, folder: Path, lines: tuple[object, ...]) -> subprocess.CompletedProcess[str]:
    """Run a file of prompts; an empty line stands for None."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join("" if line is None else json.dumps(line) for line in lines), encoding="utf-8")
    options = ("--num-inference-steps", 2, "--dtype", "float32", "--enforce-eager")
    return generate(model, "--prompts", prompts, "--output-dir", folder / "clips", *options)


@pytest.fixture(scope="module")
def made(ovi_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of the clips, and the command that made them."""
    folder = tmp_path_factory.mktemp("clips")
    gray = np.random.default_rng(0).integers(60, 200, (5, 32, 96, 1), dtype=np.uint8).repeat(3, -1)
    write_mp4(folder / "start.mp4", gray, fps=FPS)
    return folder / "clips", batch(ovi_model, folder, LINES)


def decoded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the frames (F, H, W, 3) and the samples (1, S) of a clip."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(str(path)) as container:
        return frames, np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], 1)


def test_a_bad_line_fails_alone(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    clips, done = made
    assert done.returncode == 1, done.stderr[-4000:]
    assert sorted(path.name for path in clips.iterdir()) == ["001.mp4", "003.mp4", "004.mp4", "contact_sheet.png"]
    assert "3 made, 0 finished before, 1 failed" in done.stderr
    (failed,) = [line for line in done.stderr.splitlines() if line.startswith("line 2 failed: ")]
    assert "num_inference_steps is 0" in failed
    assert done.stdout.count(", seed ") == 3


def test_segments_are_one_clip_without_a_seam(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    path = made[0] / "001.mp4"
    frames, samples = decoded(path)
    assert frames.shape == (3 * 121 - 2, 64, 96, 3)
    found = measure_mp4(path)
    assert abs(found.audio_seconds - found.video_seconds) <= 1 / FPS
    steps = np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))
    seams = [120, 240]
    others = np.delete(steps, seams)
    assert steps[seams].max() <= others.max(), (steps[seams], others.mean(), others.max())
    loud = np.abs(samples[0][: len(samples[0]) // 160 * 160]).reshape(-1, 160).max(1)
    assert (loud > 0).all(), "no gap of silence"


def test_a_clip_says_how_it_was_made_and_is_repeated(
    made: tuple[Path, subprocess.CompletedProcess[str]], ovi_model: Path, tmp_path: Path
) -> None:
    path = made[0] / "003.mp4"
    shown = CliRunner().invoke(main, ["show", str(path), "--json"])
    settings = json.loads(shown.stdout)["data"]
    assert settings["request"] == {**LINES[2], "num_outputs": 1, "num_inference_steps": 2}
    assert settings["engine"] == {"dtype": "float32", "enforce_eager": True}
    assert str(ovi_model.parent) not in shown.stdout
    done = generate(ovi_model, "--from-clip", path, "-o", tmp_path / "again.mp4")
    assert done.returncode == 0, done.stderr[-4000:]
    for first, again in zip(decoded(path), decoded(tmp_path / "again.mp4"), strict=True):
        assert np.array_equal(first, again)


def test_a_clip_that_continues_another_names_it(
    made: tuple[Path, subprocess.CompletedProcess[str]], ovi_model: Path, tmp_path: Path
) -> None:
    path = made[0] / "004.mp4"
    done = generate(ovi_model, "--from-clip", path, "-o", tmp_path / "again.mp4")
    assert done.returncode == 1 and "add --continue-from start.mp4" in done.stderr
    assert "starting the engine" not in done.stderr


def test_finished_clips_are_not_made_again(
    made: tuple[Path, subprocess.CompletedProcess[str]], ovi_model: Path
) -> None:
    clips, _ = made
    times = {path.name: path.stat().st_mtime_ns for path in clips.glob("*.mp4")}
    done = batch(ovi_model, clips.parent, (LINES[0], None, *LINES[2:]))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "0 made, 3 finished before, 0 failed" in done.stderr and "starting the engine" not in done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in clips.glob("*.mp4")} == times
