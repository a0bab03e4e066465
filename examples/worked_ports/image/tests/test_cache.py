"""Cache-DiT: with a threshold of zero it changes nothing, with a high one fewer blocks are computed."""

from __future__ import annotations

from pathlib import Path

from port_kit.port_tests import assert_cache_saves_blocks

from retouch import PORT


def test_a_cache_saves_blocks_and_only_where_it_may(model: Path) -> None:
    assert_cache_saves_blocks(PORT, model)
