"""This port computes what the original code computes, which runs in a process of its own, on tiny weights."""

from __future__ import annotations

from pathlib import Path

from port_kit.parity import run_parity
from port_kit.parity.record import Settings, record
from port_kit.registry import list_ports

from murmur import PORT

#: A checkout of the original code.
ORIGINAL = Path(__file__).parents[1] / "original"


def test_the_port_computes_what_its_original_computes(model: Path, tmp_path: Path) -> None:
    list_ports.cache_clear()
    goldens = record(PORT, model, tmp_path / "goldens", Settings(device="cpu", code=ORIGINAL)).goldens
    reports = list(run_parity(PORT, goldens))
    assert len(reports) >= 2
    for report in reports:
        assert report.ok, report.to_json()
