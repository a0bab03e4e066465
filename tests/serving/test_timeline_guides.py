"""Timeline guides, which servers have since vLLM-Omni 0.32, on a server of Ovi."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from port_kit.models.ovi.recipe import RECIPE
from port_kit.pipeline.media import measure_mp4
from port_kit.testing.server import ApiServer
from tests.serving.helpers import EXAMPLES, run_client, serving

PROMPT = "<S>One more song.<E> Audio: violin, rain."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with serving(RECIPE, tmp_path_factory.mktemp("guides")) as running:
        yield running


def ask(server: ApiServer, folder: Path, guide: dict[str, Any]) -> Any:
    """Request a video with a portrait image as the only guide file."""
    Image.new("RGB", (40, 120), (200, 80, 40)).save(folder / "first.png")
    line = ["sh", str(EXAMPLES / "ovi" / "client.sh"), PROMPT, str(folder / "guided.mp4")]
    line += ["-F", "num_inference_steps=1", "-F", f"guide_files=@{folder / 'first.png'}"]
    return run_client([*line, "--form-string", f"timeline_guides={json.dumps([guide])}"], server)


def test_a_guide_at_the_first_frame_gives_the_videos_ratio(server: ApiServer, tmp_path: Path) -> None:
    done = ask(server, tmp_path, {"frame_index": 0, "image": {"upload_index": 0}})
    assert done.returncode == 0, done.stderr
    found = measure_mp4(tmp_path / "guided.mp4")
    assert found.frames == 121 and found.height > 2 * found.width


def test_a_guide_at_another_frame_is_refused(server: ApiServer, tmp_path: Path) -> None:
    done = ask(server, tmp_path, {"frame_index": 60, "image": {"upload_index": 0}})
    assert done.returncode == 1 and "[input_value] a timeline guide has frame_index 60" in done.stderr
    assert '"code":400' in done.stderr.replace(" ", "")
    assert not (tmp_path / "guided.mp4").exists()
