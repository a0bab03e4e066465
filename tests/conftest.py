"""Fixtures that several rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden_archive import unpack

DATA = Path(__file__).parent / "data"
BUILD = Path(__file__).parents[1] / "build"


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of golden data (``SET.json``, ``ckpts/``, ``fusion/``, ...), unpacked once from ``tests/data``."""
    BUILD.mkdir(exist_ok=True)
    return unpack(DATA / "goldens.tar.xz", BUILD / "goldens")
