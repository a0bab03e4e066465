"""The benchmark of MOVA's denoiser on a CPU: small towers run, are counted as they compute, and change places."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase

from port_kit.parallel.sequence import PaddedAttention
from port_kit.runtime.single_process import single_rank

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZE = (64, 96)


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The module of the benchmark, imported as its siblings do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import mova_step

        yield mova_step


def test_operations_are_those_of_the_layers(script: Any) -> None:
    """Both sums, over the layers and attentions that run in a branch whose texts are projected."""
    counted = {"products": 0, "attention": 0}

    def linear(module: Any, given: tuple[Any, ...], result: Any) -> None:
        rows = given[0].numel() // module.input_size
        counted["products"] += 2 * rows * module.input_size * module.output_size

    def attention(module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        query, key = given[:2]
        counted["attention"] += 4 * query.shape[1] * key.shape[1] * query.shape[2] * query.shape[3]

    configs = script.configs_of(tiny=True)
    with torch.inference_mode(), single_rank(torch.float32):
        (model,) = script.build(configs, torch.device("cpu"), ("transformer",))
        branch = script.inputs(configs, *SIZE, torch.device("cpu"), torch.float32, frames=17)
        script.warm_up(model, branch)
        layers = (*model.blocks, *model.partner.audio.blocks, *model.partner.bridge.layers)
        for module in (module for layer in layers for module in layer.modules()):
            if isinstance(module, LinearBase):
                module.register_forward_hook(linear)
            elif isinstance(module, PaddedAttention):
                module.register_forward_hook(attention)
        model(**branch)
    sizes = script.sizes_of(configs, *SIZE, 17)
    assert counted == {"products": sizes.gemm_flop, "attention": sizes.attention_flop}


def test_sizes_are_those_of_the_published_clips(script: Any) -> None:
    configs = script.configs_of(tiny=False)
    small, large = (script.sizes_of(configs, *size, 193) for size in ((352, 640), (720, 1280)))
    assert (small.video, large.video, large.audio) == (43_120, 176_400, 403)


def test_a_branch_and_the_change_of_the_tower_are_timed(script: Any) -> None:
    given = argparse.Namespace(tiny=True, size=["64x96"], frames=17, switch=True, rounds=1, warm_up=0)
    result = script.run(given)
    branch = result["64x96"]
    assert (branch["video_tokens"], branch["audio_tokens"]) == (5 * 4 * 6, 36)
    assert branch["branch_ms"] > 0 and branch["limit_ms"] > 0
    assert branch["share_of_limit"] == pytest.approx(branch["limit_ms"] / branch["branch_ms"], abs=1e-3)
    change = result["switch"]
    assert len(change["changes"]) == script.CHANGES and change["tower_bytes"] > 0
    assert change["start_up_s"] > 0 and change["pinned_bytes"] == 0, "no memory of a CPU is pinned"
    assert all(row["first_call_s"] > 0 and row["next_call_s"] > 0 for row in change["changes"])
