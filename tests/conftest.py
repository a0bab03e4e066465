"""Fixtures that tests of several packages share."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from tests.golden_archive import unpack
from tests.helpers import DATA

BUILD = Path(__file__).parents[1] / "build"

# With tensor parallelism, vLLM compiles the look-up of a token, even where execution is eager. On a CPU, Inductor and
# a C++ compiler take longer for it than the tiny model for the whole request.
if version("torch").endswith("+cpu"):
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

#: Folders and modules of integration tests, relative to this folder.
INTEGRATION = (
    "autoparallel/test_compiled.py",
    "autoparallel/test_hosted.py",
    "autoparallel/test_kinds.py",
    "benchmarks/test_mova_step.py",
    "cli/test_component_config.py",
    "cli/test_doctor.py",
    "cli/test_hub.py",
    "cli/test_start.py",
    "download/test_crashes.py",
    "download/test_random_faults.py",
    "engine",
    "examples",
    "inspect/test_roles.py",
    "models",
    "parallel",
    "remap/test_parallel_load.py",
    "remap/test_parallel_ranks.py",
    "scaffold",
    "runtime/test_serving.py",
    "serving",
    "testing/test_workers.py",
    "upstream/test_upstream_patches.py",
    "upstream/test_upstream_report.py",
)


#: Modules that share a server of the session, by folder.
SHARED = {
    "serving": (
        "test_connections.py",
        "test_guides.py",
        "test_hostile.py",
        "test_hostile_media.py",
        "test_ovi.py",
        "test_progress.py",
        "test_signal.py",
    )
}


#: Modules that fork engines from one process with vLLM-Omni (:func:`port_kit.testing.forkserver.run_forked`).
FORKED = (
    "autoparallel/test_hosted.py",
    "engine/test_layouts.py",
    "engine/test_omni.py",
    "engine/test_refusals.py",
    "examples/test_audio_port.py",
    "models/test_careless.py",
    "models/test_clips_engine.py",
    "models/test_dreamid_engine.py",
    "models/test_mova_example.py",
    "models/test_options_engine.py",
    "scaffold/test_found.py",
)


class Scheduler(LoadFileScheduling):
    """One process runs a module, and all modules that share a server or what engines are forked from."""

    def _split_scope(self, nodeid: str) -> str:
        path = PurePosixPath(nodeid.partition("::")[0])
        if "/".join(path.parts[-2:]) in FORKED:
            return "forked"
        return str(path.parent if path.name in SHARED.get(path.parent.name, ()) else path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduler:
    """Distribute modules instead of single tests."""
    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of :data:`INTEGRATION` and run them first: at the end, no process waits long for the other's."""
    places = [Path(__file__).parent / name for name in INTEGRATION]
    for item in items:
        if any(item.path.is_relative_to(place) for place in places):
            item.add_marker(pytest.mark.integration)
    items.sort(key=lambda item: item.get_closest_marker("integration") is None)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of golden data (``SET.json``, ``ckpts/``, ``fusion/``, ...), unpacked once from ``tests/data``."""
    BUILD.mkdir(exist_ok=True)
    return unpack(DATA / "goldens.tar.xz", BUILD / "goldens")


@pytest.fixture(scope="session")
def mova_goldens() -> Path:
    """Folder of golden data of MOVA."""
    BUILD.mkdir(exist_ok=True)
    return unpack(DATA / "mova_goldens.tar.xz", BUILD / "goldens")
