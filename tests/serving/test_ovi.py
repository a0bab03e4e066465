"""The example's clients and workflow of Ovi: a prompt, or a first frame and a prompt, to a video with audio."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image

from port_kit.pipeline.media import measure_mp4
from port_kit.testing.server import free_port
from tests.models.test_admission import write_lora
from tests.serving import comfyui
from tests.serving.helpers import EXAMPLES, run_client, serving
from tests.serving.hostile import ALICE, Target
from tests.serving.pages import benchmark_command, client_commands, run_written

OVI = EXAMPLES / "ovi"
PROMPT = "<S>One more song.<E> Audio: violin, rain."


def test_the_workflow_of_comfyui_makes_a_video(target: Target, tmp_path: Path) -> None:
    video = comfyui.run(OVI / "comfyui_text_to_video.json", tmp_path, target.alice, num_inference_steps=1)
    (tmp_path / "video.mp4").write_bytes(video)
    found = measure_mp4(tmp_path / "video.mp4")
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
    jobs = target.alice.get("/v1/videos").json()["data"]
    done = run_written(words, "ovi", target.server, tmp_path, key=ALICE, small={"num_inference_steps": 1})
    assert done.returncode == 0, done.stderr
    (video,) = tmp_path.glob("*.mp4")
    found = measure_mp4(video)
    assert video.name in words and (found.frames, found.sample_rate) == (121, 16_000)
    assert target.alice.get("/v1/videos").json()["data"] == jobs, "a client leaves a job"


def test_unsupported_requests_of_ovi_are_refused(target: Target, tmp_path: Path) -> None:
    line = ["sh", str(OVI / "run_curl_text_to_video.sh"), PROMPT, str(tmp_path / "none.mp4")]
    reference = 'audio_reference={"audio_url": "data:audio/wav;base64,UklGRg=="}'
    done = run_client([*line, "--form-string", reference], target.server, ALICE)
    assert done.returncode == 1 and "unknown field 'audio_reference'" in done.stderr
    done = run_client([*line, "-F", 'extra_params={"slg_layer": 900}'], target.server, ALICE)
    assert done.returncode == 1 and "[input_value] slg_layer is 900" in done.stderr
    assert not (tmp_path / "none.mp4").exists()


def test_the_script_ends_if_there_is_no_server(tmp_path: Path) -> None:
    (tmp_path / "first.png").touch()
    line = ["sh", str(OVI / "run_curl_image_to_video.sh"), str(tmp_path / "first.png"), "rain"]
    line += [str(tmp_path / "none.mp4")]
    variables = {**os.environ, "BASE_URL": f"http://127.0.0.1:{free_port()}"}
    done = subprocess.run(line, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Failed to connect" in done.stderr
    assert not (tmp_path / "none.mp4").exists()


@pytest.mark.slow
def test_the_benchmark_measures_a_server_of_the_deploy_file(tmp_path: Path) -> None:
    """Two ranks, as the file says; vLLM-Omni alone ignores the file of a pipeline that it does not have."""
    options = ("--deploy-config", str(OVI / "deploy_2gpus.yaml"), "--dtype", "float32")
    with serving("ovi", tmp_path, *options) as server:
        names = [process.name() for process in psutil.Process(server.pid).children(recursive=True)]
        assert len([name for name in names if name.startswith("vLLM-Omni::Diff")]) == 2, names
        done = run_client(benchmark_command("ovi", tmp_path / "tiny", server), server)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Successful requests: +2\b", done.stdout) and "Video RTF" in done.stdout, done.stdout
