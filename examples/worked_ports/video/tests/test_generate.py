"""The example script, through vLLM-Omni's engine on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from port_kit.port_tests import run_script

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "generate_driftwood.py"


@pytest.mark.engine
def test_the_engine_makes_a_video(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    printed = run_script(SCRIPT, model, target, environment={"PYTHONPATH": str(ROOT / "original")})
    assert "48x32" in printed
