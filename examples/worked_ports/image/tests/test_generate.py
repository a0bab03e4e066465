"""The example script, through vLLM-Omni's engine on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from port_kit.port_tests import run_script

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "generate_retouch.py"


@pytest.mark.engine
def test_the_engine_makes_an_image(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    source = tmp_path / "picture.png"
    Image.new("RGB", (96, 64), (200, 30, 90)).save(source)
    variables = {"PYTHONPATH": str(ROOT / "original")}
    printed = run_script(SCRIPT, model, target, "--image", str(source), environment=variables)
    assert "48x32" in printed
