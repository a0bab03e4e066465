"""One server on a tiny model for a whole module, started as a user starts it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers import only_in
from tests.serving.helpers import ROOT

collect_ignore = only_in("0.32", "test_timeline_guides.py")


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
