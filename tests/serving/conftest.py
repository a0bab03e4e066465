"""One server on a tiny model for a whole module, started as a user starts it; and the example's clients."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from port_kit.testing.server import ApiServer

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "online_serving" / "dreamid_omni"

#: Finished files are kept for so many seconds in the tests' server.
KEPT = 20


def _load(path: Path) -> ModuleType:
    """Import a script by its path, under its own name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def storm() -> ModuleType:
    """The load benchmark: what it sends, and what it makes of the answers."""
    return _load(ROOT / "benchmarks" / "serving_storm.py")


@pytest.fixture(scope="session")
def clients() -> ModuleType:
    """The example's client module."""
    return _load(EXAMPLE.parent / "video_client.py")


@pytest.fixture(scope="module")
def server(storm: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A server of a tiny DreamID-Omni; its process group is killed in the end."""
    folder = tmp_path_factory.mktemp("serving")
    environment = {
        "OMP_NUM_THREADS": "1",
        "VLLM_OMNI_SERVER_STORAGE__FILE_TTL": str(KEPT),
        "VLLM_OMNI_SERVER_STORAGE__TTL_SWEEP_INTERVAL": "1",
    }
    model = storm.tiny_model(folder)
    options = ("--dtype", "float32", "--enforce-eager")
    with ApiServer(model, *options, folder=folder, environment=environment) as running:
        yield running
