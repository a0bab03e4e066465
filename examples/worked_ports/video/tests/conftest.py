"""The port, found without being installed, and a tiny model directory that every test shares."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "original"))
os.environ["PORT_KIT_PATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PORT_KIT_PATH")]))
# A loopback Hub must not be looked for behind a proxy.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory, downloaded from a loopback Hub."""
    from port_kit.registry import find_port, list_ports
    from port_kit.testing import download_tiny

    list_ports.cache_clear()
    folder = tmp_path_factory.mktemp("driftwood")
    report = download_tiny(find_port("driftwood"), folder / "driftwood")
    return Path(report.directory)
