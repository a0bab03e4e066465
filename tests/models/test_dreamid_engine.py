"""DreamID-Omni through vLLM-Omni's own engine: refused requests, and that the next one is served. One start for all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from port_kit.testing.forkserver import run_forked

SCRIPT = Path(__file__).with_name("run_dreamid.py")


@pytest.fixture(scope="module")
def answers(dreamid_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The engine's answers by request."""
    report = tmp_path_factory.mktemp("engine") / "report.jsonl"
    command = [sys.executable, str(SCRIPT), str(dreamid_model), str(report)]
    done = run_forked(command, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    return {line.pop("name"): line for line in lines}


def test_a_good_request_gives_a_video_with_audio(answers: dict[str, dict[str, Any]]) -> None:
    good = answers["good before"]
    assert (good["type"], good["video"], good["dtype"]) == ("video", [121, 64, 96, 3], "uint8")
    assert (good["audio"], good["rate"], good["fps"]) == ([80_384], 16_000, 24)


@pytest.mark.parametrize(
    ("name", "code", "mentioned"),
    [
        ("no images", "input_missing", "image"),
        ("no audio", "input_missing", "audio"),
        ("text only", "input_missing", "image"),
        ("unequal counts", "input_count", "2"),
        ("size", "input_size", "height is 100"),
        ("zero steps", "input_value", "num_inference_steps is 0"),
        ("negative steps", "input_value", "num_inference_steps is -2"),
        ("long prompt", "input_too_long", "10000"),
        ("corrupt image", "input_unreadable", "image 1"),
        ("missing file", "input_unreadable", "reference audio 1"),
        ("short audio", "input_too_short", "reference audio 2"),
        ("wrong type", "input_type", "image 1 is int"),
        ("scale", "input_value", "audio_cfg_scale is nan"),
        ("misspelt", "input_value", "video_cfg_scale"),
    ],
)
def test_a_bad_request_is_the_clients_error(
    answers: dict[str, dict[str, Any]], name: str, code: str, mentioned: str
) -> None:
    answer = answers[name]
    assert f"[{code}]" in answer["error"] and mentioned in answer["error"]
    assert (answer["type"], answer["status"]) == ("OmniClientError", 400)


def test_the_engine_serves_the_next_request_with_the_same_result(answers: dict[str, dict[str, Any]]) -> None:
    assert answers["good after"] == answers["good before"]
