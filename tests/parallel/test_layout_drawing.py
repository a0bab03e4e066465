"""The drawing of a layout agrees with vLLM-Omni's own groups."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import pytest
from vllm_omni.diffusion.distributed import parallel_state

from port_kit.parallel.layout import Layout
from port_kit.reports.layouts import Place, places

LAYOUTS = (
    "tp2",
    "cfg2",
    "tp2xulysses2",
    "ulysses2xring2",
    "tp2xulysses2xcfg2",
    "ulysses2xring3xcfg2",
    "allgather4xtp2",
)


def groups(found: Iterable[Place], *alike: str) -> list[list[int]]:
    """Ranks that agree in these fields."""
    members: dict[tuple[int, ...], list[int]] = {}
    for place in found:
        members.setdefault(tuple(getattr(place, name) for name in alike), []).append(place.rank)
    return sorted(members.values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_are_those_of_the_engine(name: str) -> None:
    layout, found = Layout.parse(name), places(Layout.parse(name))
    generator = parallel_state.RankGenerator(layout.tp, layout.sequence, 1, layout.cfg, 1, order="tp-sp-pp-cfg-dp")
    assert groups(found, "sequence", "cfg") == sorted(generator.get_ranks("tp"))
    assert groups(found, "tp", "cfg") == sorted(generator.get_ranks("sp"))
    assert groups(found, "tp", "sequence") == sorted(generator.get_ranks("cfg"))


def test_ulysses_is_contiguous_within_a_sequence_and_ring_strides_over_it() -> None:
    defaults = inspect.signature(parallel_state.set_seq_parallel_pg).parameters
    assert defaults["use_ulysses_low"].default is True
    found = places(Layout.parse("ulysses2xring3"))
    assert groups(found, "ring") == [[0, 1], [2, 3], [4, 5]]
    assert groups(found, "ulysses") == [[0, 2, 4], [1, 3, 5]]


def test_neighbours_share_parameters_under_hsdp() -> None:
    source = inspect.getsource(parallel_state)
    assert 'order="tp-sp-pp-cfg-dp"' in source
    assert "list(range(start, start + fully_shard_degree)) for start in range(0, world_size" in source
    assert [place.hsdp for place in places(Layout.parse("hsdp2xcfg2xulysses2"))] == [0, 1, 0, 1]
