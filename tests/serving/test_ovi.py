"""The example's clients of Ovi: a prompt, or a first frame and a prompt, to a video with audio."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from port_kit.pipeline.media import measure_mp4
from tests.models.test_admission import write_lora
from tests.serving.helpers import EXAMPLES, run_client
from tests.serving.hostile import ALICE, Target
from tests.serving.pages import client_commands, run_written

OVI = EXAMPLES / "ovi"
PROMPT = "<S>One more song.<E> Audio: violin, rain."


def test_a_prompt_becomes_a_video_with_audio(target: Target, tmp_path: Path) -> None:
    output = tmp_path / "text.mp4"
    done = run_client(
        ["sh", str(OVI / "client.sh"), PROMPT, str(output), "-F", "num_inference_steps=1"], target.server, ALICE
    )
    assert done.returncode == 0, done.stderr
    found = measure_mp4(output)
    assert (found.frames, found.fps, found.sample_rate) == (121, 24, 16_000)
    assert found.audio_seconds == pytest.approx(found.video_seconds, abs=0.1)


def test_a_first_frame_gives_the_videos_ratio(target: Target, tmp_path: Path) -> None:
    Image.new("RGB", (40, 120), (200, 80, 40)).save(tmp_path / "first.png")
    line = [sys.executable, str(OVI / "client.py"), "--server", target.server.url, "--prompt", PROMPT]
    line += ["--image", str(tmp_path / "first.png"), "--num-inference-steps", "1", "-o", str(tmp_path / "image.mp4")]
    done = run_client(line, target.server, ALICE)
    assert done.returncode == 0, done.stderr
    found = measure_mp4(tmp_path / "image.mp4")
    assert found.frames == 121 and found.height > 2 * found.width


@pytest.mark.parametrize("words", client_commands("ovi"), ids=" ".join)
def test_a_command_of_the_page_makes_a_video(target: Target, words: list[str], tmp_path: Path) -> None:
    Image.new("RGB", (40, 120), (200, 80, 40)).save(tmp_path / "first_frame.png")
    for name in ("style", "motion"):
        write_lora(target.loras / f"{name}.safetensors", target.model)
    done = run_written(words, "ovi", target.server, tmp_path, key=ALICE, small={"num_inference_steps": 1})
    assert done.returncode == 0, done.stderr
    (video,) = tmp_path.glob("*.mp4")
    assert video.name in words and measure_mp4(video).frames == 121


def test_unsupported_requests_of_ovi_are_refused(target: Target, tmp_path: Path) -> None:
    line = ["sh", str(OVI / "client.sh"), PROMPT, str(tmp_path / "none.mp4")]
    reference = 'audio_reference={"audio_url": "data:audio/wav;base64,UklGRg=="}'
    done = run_client([*line, "--form-string", reference], target.server, ALICE)
    assert done.returncode == 1 and "unknown field 'audio_reference'" in done.stderr
    done = run_client([*line, "-F", 'extra_params={"slg_layer": 900}'], target.server, ALICE)
    assert done.returncode == 1 and "slg_layer is 900" in done.stderr
    assert not (tmp_path / "none.mp4").exists()
