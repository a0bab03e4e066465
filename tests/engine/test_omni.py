"""The plugins through ``Omni`` itself, as a user's script would meet them: one rank, and two with Ring attention."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from port_kit.testing.forkserver import run_forked

SCRIPT = Path(__file__).with_name("run_omni.py")
LAYOUTS = ("single", "ring_degree=2")


@pytest.fixture(scope="module")
def reports(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The script's output for each layout; it runs once, in a separate process."""
    report = tmp_path_factory.mktemp("omni") / "report.jsonl"
    command = [sys.executable, str(SCRIPT), str(toy_model), str(report), *LAYOUTS]
    done = run_forked(command, timeout=400, PORT_KIT_PATH=os.environ["PORT_KIT_PATH"])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    return {row["layout"]: row for row in rows}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cpu_platform_is_active(layout: str, reports: dict[str, dict[str, Any]]) -> None:
    assert reports[layout]["platform"] == "CpuOmniPlatform"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_port_with_audio_is_a_video_stage(layout: str, reports: dict[str, dict[str, Any]]) -> None:
    report = reports[layout]
    assert report["stage_types"] == ["video"]
    assert report["final_output_type"] == "video"
    assert report["video_shape"] == [5, 160, 160, 3]
    assert report["audio_shape"] == [3333]
    assert (report["fps"], report["audio_sample_rate"]) == (24, 16000)
    assert report["video_std"] > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_failed_request_is_reported_and_the_next_is_served(layout: str, reports: dict[str, dict[str, Any]]) -> None:
    report = reports[layout]
    assert "this prompt fails" in report["failure"]
    assert report["again"] == {name: report[name] for name in report["again"]}


def test_two_ranks_agree_with_one(reports: dict[str, dict[str, Any]]) -> None:
    one, two = (reports[layout] for layout in LAYOUTS)
    assert two["video_sum"] == pytest.approx(one["video_sum"], rel=1e-6)
    assert two["audio_sum"] == pytest.approx(one["audio_sum"], rel=1e-5)
