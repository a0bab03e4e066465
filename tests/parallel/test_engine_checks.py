"""The check before an engine's workers start: its errors, and that it does not change the process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from vllm.distributed import parallel_state
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig

from port_kit.errors import ParallelError
from port_kit.models.wan.transformer.config import TRANSFORMER_CONFIG
from port_kit.models.wan.transformer.model import build_transformer
from port_kit.parallel.engine_checks import check_engine, layout_of
from port_kit.parallel.layout import Layout
from port_kit.parallel.preflight import describe_model, preflight
from port_kit.runtime.single_process import single_rank


def engine(layout: str, **fields: Any) -> OmniDiffusionConfig:
    """The configuration of an engine with this layout."""
    parallel: Mapping[str, Any] = Layout.parse(layout).parallel_config
    return OmniDiffusionConfig(
        model="m", dtype=torch.bfloat16, parallel_config=DiffusionParallelConfig(**parallel), **fields
    )


def build() -> list[nn.Module]:
    return [build_transformer(TRANSFORMER_CONFIG)]


def test_one_rank_needs_no_check() -> None:
    def never() -> list[nn.Module]:
        raise AssertionError("built for one rank")

    assert check_engine(engine("single"), never, branches=4) is None


@pytest.mark.parametrize("text", ["tp2xulysses2xcfg2", "hsdp4xcfg4", "hsdp4", "ulysses2xring2", "allgather4"])
def test_the_memory_of_a_rank_is_known_before_loading(text: str) -> None:
    config = engine(text)
    assert str(layout_of(config.parallel_config)) == text
    before = (parallel_state._TP, torch.get_default_dtype())
    plan = check_engine(config, build, branches=4)
    assert (parallel_state._TP, torch.get_default_dtype()) == before
    assert torch.empty(1).device.type == "cpu"
    with single_rank(torch.bfloat16), torch.device("meta"):
        shape = describe_model(*build(), branches=4)
    assert plan == preflight(Layout.parse(text), shape)


def test_an_impossible_layout_is_refused_with_the_possible_ones() -> None:
    with pytest.raises(ParallelError) as caught:
        check_engine(engine("tp5xcfg2"), build, branches=4)
    assert caught.value.code == "parallel_degree"
    assert caught.value.details["possible"]["cfg"] == [2, 4]
    assert all(size in caught.value.hint for size in ("11.7", "5.84", "2.92 GB"))


@pytest.mark.parametrize("layout", ["single", "cfg2", "cfg4", "tp2"])
def test_a_cache_requires_equal_numbers_of_branches_per_rank(layout: str) -> None:
    check_engine(engine(layout, cache_backend="cache_dit"), build, branches=4)


def test_a_cache_over_unequal_numbers_of_branches_is_refused() -> None:
    with pytest.raises(ParallelError) as caught:
        check_engine(engine("cfg3", cache_backend="cache_dit"), build, branches=4)
    assert caught.value.code == "cache_passes"
    assert "cfg_parallel_size" in caught.value.hint
