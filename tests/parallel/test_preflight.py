"""Layouts are checked before anything is loaded, and the answer to a wrong one is the list of right ones."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from port_kit.errors import ParallelError
from port_kit.models.wan.transformer.config import TRANSFORMER_CONFIG
from port_kit.models.wan.transformer.model import build_transformer
from port_kit.parallel.layout import Layout
from port_kit.parallel.preflight import ModelShape, describe_model, possible_degrees, preflight
from port_kit.parallel.verify import DEFAULT_LAYOUTS
from port_kit.runtime.single_process import single_rank

GIB = 2**30


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    with single_rank(torch.bfloat16), torch.device("meta"):
        return describe_model(build_transformer(TRANSFORMER_CONFIG), branches=4)


def test_the_full_size_model_is_described_without_weights(shape: ModelShape) -> None:
    assert shape.heads == 24
    assert shape.weight_bytes == 2 * 11_660_753_108
    assert shape.split_bytes / shape.weight_bytes > 0.999
    assert shape.sharded
    assert shape.block_bytes > shape.weight_bytes / 35


@pytest.mark.parametrize(
    ("layout", "gibibytes"),
    [("single", 21.72), ("ulysses2", 21.72), ("tp2", 10.87), ("tp4xulysses2", 5.44), ("hsdp2", 10.86)],
)
def test_memory_a_rank(layout: str, gibibytes: float, shape: ModelShape) -> None:
    plan = preflight(Layout.parse(layout), shape, ranks=8)
    assert plan.weight_bytes / GIB == pytest.approx(gibibytes, abs=0.02)
    assert (plan.peak_weight_bytes > plan.weight_bytes) == ("hsdp" in layout)


@pytest.mark.parametrize("layout", DEFAULT_LAYOUTS)
def test_the_matrix_is_possible(layout: str, shape: ModelShape) -> None:
    assert preflight(Layout.parse(layout), shape).to_json()["layout"] == layout


@pytest.mark.parametrize(
    ("layout", "degrees"),
    [
        ("tp5", "1, 2, 4 or 8"),
        ("ulysses5", "1, 2, 3, 4, 6, 8, 12 or 24"),
        ("tp8xulysses2", "1 or 3"),
        ("cfg8", "1, 2 or 4"),
        ("ring4xcfg4", "8"),
    ],
)
def test_an_impossible_layout_is_answered_with_possible_ones(layout: str, degrees: str, shape: ModelShape) -> None:
    with pytest.raises(ParallelError) as caught:
        preflight(Layout.parse(layout), shape, ranks=8)
    assert caught.value.code == "parallel_degree"
    assert caught.value.details["problems"][0].endswith(f" {degrees}")
    assert all(size in caught.value.hint for size in ("11.7", "5.84", "2.92", "23.3 GB"))
    assert caught.value.details["weight_bytes"]["hsdp4"] == -(-shape.weight_bytes // 4)
    assert caught.value.details["possible"]["cfg"] == [2, 4]
    assert pickle.loads(pickle.dumps(caught.value)).message == caught.value.message


def test_all_problems_are_reported_at_once(shape: ModelShape) -> None:
    with pytest.raises(ParallelError) as caught:
        preflight(Layout(tp=5, cfg=3, ring=2), replace(shape, branches=2, sharded=False), ranks=2)
    assert len(caught.value.details["problems"]) == 4


def test_a_model_that_declares_nothing_has_no_sharding(shape: ModelShape) -> None:
    bare = replace(shape, sharded=False, block_bytes=0, branches=1)
    assert possible_degrees(bare, 8) == {"tp": [2, 4, 8]}
    for layout, declaration in ((Layout(ulysses=2), "_sp_plan"), (Layout(hsdp=2), "_hsdp_shard_conditions")):
        with pytest.raises(ParallelError) as caught:
            preflight(layout, bare)
        (problem,) = caught.value.details["problems"]
        assert declaration in problem


@pytest.mark.parametrize(
    ("text", "world"), [("single", 1), ("tp2xulysses2xcfg2", 8), ("hsdp4", 4), ("hsdp2xcfg4", 4), ("ulysses3xring2", 6)]
)
def test_a_layout_reads_its_own_text(text: str, world: int) -> None:
    layout = Layout.parse(text)
    assert (str(layout), layout.world) == (text, world)


@pytest.mark.parametrize("text", ["tp0", "tp2xtp2", "pp2", "", "allgather2xring2", "tp2xhsdp2", "hsdp3xcfg4"])
def test_a_layout_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(ParallelError) as caught:
        Layout.parse(text)
    assert caught.value.code == "parallel_degree"


def test_the_engine_accepts_the_configuration_of_a_layout() -> None:
    from vllm_omni.diffusion.data import DiffusionParallelConfig

    for text in (*DEFAULT_LAYOUTS, "single", "hsdp2xcfg4"):
        layout = Layout.parse(text)
        assert DiffusionParallelConfig(**layout.parallel_config).world_size == layout.world
