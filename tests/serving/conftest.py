"""One server on the tiny Ovi for all modules that need no other, started as a user starts it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers import only_in
from tests.serving import hostile
from tests.serving.helpers import ROOT

collect_ignore = only_in("0.32", "test_guides.py")


def _load(path: Path) -> ModuleType:
    """Import a script by its path, under its own name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_test() -> ModuleType:
    """The load benchmark as a module."""
    return _load(ROOT / "benchmarks" / "serving_storm.py")


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hostile.Target]:
    """The server of Ovi."""
    with hostile.target(tmp_path_factory.mktemp("ovi")) as running:
        yield running


@pytest.fixture(scope="session")
def first(target: hostile.Target) -> bytes:
    """The video of the good request."""
    response = target.sync()
    assert response.status_code == 200, response.text
    return response.content
