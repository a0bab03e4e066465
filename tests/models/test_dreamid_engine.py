"""DreamID-Omni through vLLM-Omni's own engine: refused requests, and that the next one is served. One start for all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("run_dreamid.py")


@pytest.fixture(scope="module")
def answers(dreamid_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The engine's answers by request."""
    report = tmp_path_factory.mktemp("engine") / "report.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(dreamid_model), str(report)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    return {line.pop("name"): line for line in lines}


def test_a_good_request_gives_a_video_with_its_sound(answers: dict[str, dict[str, Any]]) -> None:
    good = answers["good before"]
    assert (good["type"], good["video"], good["dtype"]) == ("video", [121, 64, 96, 3], "uint8")
    assert (good["audio"], good["rate"], good["fps"]) == ([80_384], 16_000, 24)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no images", "no reference image"),
        ("no audio", "no reference audio"),
        ("text only", "no reference image"),
        ("unequal counts", "1 reference image(s) and 2 reference audio(s)"),
        ("size", "height is 100; a multiple of 32 is required"),
        ("zero steps", "num_inference_steps is 0"),
        ("negative steps", "num_inference_steps is -2"),
        ("long prompt", "prompt has 10000 characters"),
        ("corrupt image", "image 1 cannot be read"),
        ("missing file", "reference audio 1 cannot be read"),
        ("short audio", "reference audio 2 lasts 1.25 s"),
        ("wrong type", "image 1 is int"),
        ("scale", "audio_cfg_scale is nan"),
        ("misspelt", "did you mean 'video_cfg_scale'"),
    ],
)
def test_a_bad_request_is_the_clients_error(answers: dict[str, dict[str, Any]], name: str, says: str) -> None:
    answer = answers[name]
    assert says in answer["error"]
    assert (answer["type"], answer["status"]) == ("OmniClientError", 400)
    assert answer["seconds"] < 0.5 * answers["good before"]["seconds"]


def test_the_engine_serves_the_next_request_with_the_same_result(answers: dict[str, dict[str, Any]]) -> None:
    before, after = answers["good before"], answers["good after"]
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
