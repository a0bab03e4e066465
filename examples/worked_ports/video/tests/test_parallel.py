"""Two ranks compute what one computes, and each does its share."""

from __future__ import annotations

from pathlib import Path

from port_kit.port_tests import assert_ranks_agree

from driftwood import PORT

LAYOUTS = ("tp2", "ulysses2", "ring2", "cfg2", "hsdp2")


def test_ranks_share_the_work(tmp_path: Path) -> None:
    assert_ranks_agree(PORT, tmp_path, LAYOUTS)
