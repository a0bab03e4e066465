"""One server on a tiny model for a whole module, started as a user starts it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from port_kit.download import Recipe
from port_kit.registry import find_port
from port_kit.testing.server import ApiServer
from port_kit.testing.tiny_port import download_tiny

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "online_serving"


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


@contextmanager
def serving(recipe: Recipe, folder: Path, **environment: str) -> Iterator[ApiServer]:
    """Serve the tiny model of a recipe; the server's process group is killed in the end."""
    model = download_tiny(find_port(recipe.name), folder / "model").directory
    variables = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "INFO", **environment}
    with ApiServer(model, "--dtype", "float32", "--enforce-eager", folder=folder, environment=variables) as running:
        yield running


def run_client(command: list[str], server: ApiServer) -> subprocess.CompletedProcess[str]:
    """Run one of the examples' clients against a server, whose address a shell script reads from SERVER."""
    environment = {**os.environ, "SERVER": server.url, "NO_PROXY": "127.0.0.1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
