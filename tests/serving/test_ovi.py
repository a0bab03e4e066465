"""Ovi behind the example's own start script: a prompt, or a first frame and a prompt, to a video with audio."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from port_kit.models.ovi import PORT
from port_kit.pipeline.media import measure_mp4
from port_kit.testing.server import ApiServer
from port_kit.testing.tiny_port import download_tiny
from tests.serving.helpers import EXAMPLES, run_client

OVI = EXAMPLES / "ovi"
PROMPT = "<S>One more song.<E> Audio: violin, rain."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    folder = tmp_path_factory.mktemp("ovi")
    model = download_tiny(PORT, folder / "model").directory
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with ApiServer(
        model,
        "--dtype",
        "float32",
        "--enforce-eager",
        folder=folder,
        script=EXAMPLES / "serve.sh",
        environment={"OMP_NUM_THREADS": "1", "PATH": path},
    ) as running:
        yield running


def test_a_prompt_becomes_a_video_with_audio(server: ApiServer, tmp_path: Path) -> None:
    output = tmp_path / "text.mp4"
    done = run_client(["sh", str(OVI / "client.sh"), PROMPT, str(output), "-F", "num_inference_steps=1"], server)
    assert done.returncode == 0, done.stderr
    found = measure_mp4(output)
    assert (found.frames, found.fps, found.sample_rate) == (121, 24, 16_000)
    assert found.audio_seconds == pytest.approx(found.video_seconds, abs=0.1)


def test_a_first_frame_gives_the_videos_ratio(server: ApiServer, tmp_path: Path) -> None:
    Image.new("RGB", (40, 120), (200, 80, 40)).save(tmp_path / "first.png")
    line = [sys.executable, str(OVI / "client.py"), "--server", server.url, "--prompt", PROMPT]
    line += ["--image", str(tmp_path / "first.png"), "--num-inference-steps", "1", "-o", str(tmp_path / "image.mp4")]
    done = run_client(line, server)
    assert done.returncode == 0, done.stderr
    found = measure_mp4(tmp_path / "image.mp4")
    assert found.frames == 121 and found.height > 2 * found.width


def test_unsupported_requests_of_ovi_are_refused(server: ApiServer, tmp_path: Path) -> None:
    line = ["sh", str(OVI / "client.sh"), PROMPT, str(tmp_path / "none.mp4")]
    reference = 'audio_reference={"audio_url": "data:audio/wav;base64,UklGRg=="}'
    done = run_client([*line, "--form-string", reference], server)
    assert done.returncode == 1 and "unknown field 'audio_reference'" in done.stderr
    done = run_client([*line, "-F", 'extra_params={"slg_layer": 900}'], server)
    assert done.returncode == 1 and "slg_layer is 900" in done.stderr
    assert not (tmp_path / "none.mp4").exists()
