"""The worked port that edits an image: its own tests, with the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.worked_ports import run_own_tests


@pytest.mark.slow
def test_the_port_passes_all_of_its_tests(tmp_path: Path) -> None:
    assert "7 passed" in run_own_tests("image", folder=tmp_path)
