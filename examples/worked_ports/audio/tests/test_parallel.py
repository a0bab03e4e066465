"""Two ranks compute what one computes, and each does its share."""

from __future__ import annotations

from pathlib import Path

from port_kit.parallel.verify import port_test_case, verify_parallel
from port_kit.registry import list_ports

from murmur import PORT

LAYOUTS = ("tp2", "ulysses2", "ring2", "cfg2", "hsdp2")


def test_ranks_share_the_work(tmp_path: Path) -> None:
    list_ports.cache_clear()
    for report in verify_parallel(port_test_case(PORT, tmp_path), LAYOUTS):
        assert report.ok, report.describe()
