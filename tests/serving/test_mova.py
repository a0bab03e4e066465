"""The commands of MOVA's page on a server of its own: a first frame and a prompt to a video with audio."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from port_kit.pipeline.media import measure_mp4
from tests.serving import comfyui
from tests.serving.helpers import EXAMPLES, run_client, serving
from tests.serving.pages import benchmark_command, client_commands, run_written

KEY = "any"


@pytest.mark.slow
def test_the_commands_of_the_page_work(tmp_path: Path) -> None:
    """In their order: some read what others wrote."""
    small = {"width": 96, "height": 64, "num_frames": 17, "num_inference_steps": 1}
    with serving("mova", tmp_path, "--api-key", KEY) as server:
        for words in client_commands("mova"):
            done = run_written(words, "mova", server, tmp_path, key=KEY, small=small)
            assert done.returncode == 0, (words, done.stdout, done.stderr)
        done = run_client(benchmark_command("mova", tmp_path / "tiny", server), server, KEY, folder=tmp_path)
        assert re.search(r"Successful requests: +2\b", done.stdout), (done.stdout, done.stderr)
        fields = {"prompt": "rain", "size": "96x64", "seconds": "0.7", "num_inference_steps": "1"}
        picture = {"input_reference": (tmp_path / "first_frame.png").read_bytes()}
        headers = {"Authorization": f"Bearer {KEY}"}
        answer = httpx.post(f"{server.url}/v1/videos/sync", data=fields, files=picture, headers=headers, timeout=300)
        assert answer.status_code == 200, answer.text
        (tmp_path / "seconds.mp4").write_bytes(answer.content)
        with httpx.Client(base_url=server.url, headers=headers, timeout=300) as http:
            workflow = EXAMPLES / "mova" / "comfyui_image_to_video.json"
            changed = {"width": 96, "height": 64, "duration": 0.708, "num_inference_steps": 1}
            (tmp_path / "workflow.mp4").write_bytes(comfyui.run(workflow, tmp_path, http, **changed))
    videos = {path.name: measure_mp4(path) for path in tmp_path.glob("*.mp4")}
    assert set(videos) == {"tiny.mp4", "curl.mp4", "rain.mp4", "seconds.mp4", "workflow.mp4"}
    assert all(video.frames == 17 and (video.width, video.height) == (96, 64) for video in videos.values())
