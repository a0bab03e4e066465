"""Fixtures that several rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden_archive import unpack

DATA = Path(__file__).parent / "data"
BUILD = Path(__file__).parents[1] / "build"

#: Folders and modules of integration tests, relative to this folder.
INTEGRATION = (
    "cli/test_doctor.py",
    "cli/test_verify_parity.py",
    "download/test_kill.py",
    "download/test_lying_server.py",
    "engine",
    "models",
    "parallel",
    "private",
    "reference",
    "remap/test_parallel_load.py",
    "remap/test_parallel_ranks.py",
    "scaffold",
    "serving",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of :data:`INTEGRATION`."""
    places = [Path(__file__).parent / name for name in INTEGRATION]
    for item in items:
        if any(item.path.is_relative_to(place) for place in places):
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of golden data (``SET.json``, ``ckpts/``, ``fusion/``, ...), unpacked once from ``tests/data``."""
    BUILD.mkdir(exist_ok=True)
    return unpack(DATA / "goldens.tar.xz", BUILD / "goldens")
