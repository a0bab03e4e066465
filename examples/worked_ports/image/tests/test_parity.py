"""This port computes what the original code computes, which runs in a process of its own, on tiny weights."""

from __future__ import annotations

from pathlib import Path

from port_kit.port_tests import assert_matches_original

from retouch import PORT

#: A checkout of the original code.
ORIGINAL = Path(__file__).parents[1] / "original"


def test_the_port_computes_what_its_original_computes(model: Path, tmp_path: Path) -> None:
    assert_matches_original(PORT, model, ORIGINAL, tmp_path)
