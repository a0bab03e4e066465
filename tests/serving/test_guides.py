"""Timeline guides, which servers have since vLLM-Omni 0.32, on a server of Ovi."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from port_kit.pipeline.media import measure_mp4
from tests.serving.helpers import EXAMPLES, run_client
from tests.serving.hostile import ALICE, Target

PROMPT = "<S>One more song.<E> Audio: violin, rain."


def ask(target: Target, folder: Path, guide: dict[str, Any]) -> Any:
    """Request a video with a portrait image as the only guide file."""
    Image.new("RGB", (40, 120), (200, 80, 40)).save(folder / "first.png")
    line = ["sh", str(EXAMPLES / "ovi" / "run_curl_text_to_video.sh"), PROMPT, str(folder / "guided.mp4")]
    line += ["-F", "num_inference_steps=1", "-F", f"guide_files=@{folder / 'first.png'}"]
    return run_client([*line, "--form-string", f"timeline_guides={json.dumps([guide])}"], target.server, ALICE)


def test_a_guide_at_the_first_frame_gives_the_videos_ratio(target: Target, tmp_path: Path) -> None:
    done = ask(target, tmp_path, {"frame_index": 0, "image": {"upload_index": 0}})
    assert done.returncode == 0, done.stderr
    found = measure_mp4(tmp_path / "guided.mp4")
    assert found.frames == 121 and found.height > 2 * found.width


def test_a_guide_at_another_frame_is_refused(target: Target, tmp_path: Path) -> None:
    done = ask(target, tmp_path, {"frame_index": 60, "image": {"upload_index": 0}})
    assert done.returncode == 1 and "[input_value] a timeline guide has frame_index 60" in done.stderr
    assert '"code":400' in done.stderr.replace(" ", "")
    assert not (tmp_path / "guided.mp4").exists()
