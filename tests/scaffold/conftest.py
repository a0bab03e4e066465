"""A loopback Hub with a tiny LTX-Video, and a shell in which a reader of the guide would sit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from port_kit.testing.hub import Hub
from tests.scaffold.helpers import REPOSITORY, write_ltx


@pytest.fixture(scope="session")
def ltx_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub that serves the tiny model under the real one's name."""
    files = write_ltx(tmp_path_factory.mktemp("hub") / "ltx")
    with Hub({REPOSITORY: files}) as hub:
        yield hub
