"""vLLM-Omni's interface of skip-layer guidance, which 0.32 introduced, with the fusion transformer and its options."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_omni.diffusion.guidance import (
    FlowMatchingPredictionAdapter,
    SkipLayerGuidanceConfig,
    SkipLayerGuidanceMixin,
    prepare_skip_layer_guidance,
)
from vllm_omni.diffusion.models.interface import SupportsSkipLayerGuidance

from port_kit.models.wan.transformer.config import TRANSFORMER_CONFIG
from port_kit.models.wan.transformer.model import WanFusionTransformer, build_transformer
from port_kit.parallel.cfg_batching import BatchedCFGMixin
from port_kit.pipeline.skip_layers import parse_skip_layers
from port_kit.runtime.single_process import single_rank
from tests.helpers import raises

TINY = {"num_layers": 4, "dim": 48, "num_heads": 4, "ffn_dim": 64, "text_dim": 16}


@pytest.fixture(scope="module")
def transformer() -> WanFusionTransformer:
    """Return a transformer of four layers."""
    with single_rank(torch.float32):
        towers = {name: {**TRANSFORMER_CONFIG[name], **TINY} for name in ("video", "audio")}
        return build_transformer({**TRANSFORMER_CONFIG, **towers})


def prepare(transformer: WanFusionTransformer, options: dict[str, Any], steps: int) -> Any:
    """Return vLLM-Omni's schedule of the options."""
    config = SkipLayerGuidanceConfig.from_extra_args(options)
    return prepare_skip_layer_guidance(config, transformer=transformer, sigmas=torch.linspace(1, 0.1, steps))


def test_the_transformer_satisfies_the_protocol(transformer: WanFusionTransformer) -> None:
    assert isinstance(transformer, SupportsSkipLayerGuidance)
    assert prepare(transformer, {"uncond_skip_layers": [0, 3]}, 2) is not None
    with raises("block_index", "skip_layers has 4", "0 to 3"):
        prepare(transformer, {"uncond_skip_layers": [4]}, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"uncond_skip_layers": [2, 1]},
        {"uncond_skip_layers": "1, 3", "slg_start": 0.1, "slg_stop": 0.6},
        {"uncond_skip_layers": (0,), "slg_start_percent": 0.5, "slg_end_percent": 0.5},
        {"uncond_skip_layers": [1], "slg_start": 1 / 3},
    ],
)
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_layers_and_steps_are_those_of_vllm_omni(
    transformer: WanFusionTransformer, options: dict[str, Any], steps: int
) -> None:
    theirs = prepare(transformer, options, steps)
    ours = parse_skip_layers(options, name="slg_layer", default=0, layers=4)
    assert ours.layers == theirs.config.uncond_skip_layers
    assert [bool(ours.at(step, steps)) for step in range(steps)] == list(theirs.active_steps)


class OwnMixin(BatchedCFGMixin, SkipLayerGuidanceMixin):
    """Pipeline whose transformer predicts ten times a branch's number, or one more if it omits layers."""

    slg_prediction_adapter = FlowMatchingPredictionAdapter()

    def __init__(self, *, batched: bool) -> None:
        parallel = SimpleNamespace(use_hsdp=batched, sequence_parallel_size=1, tensor_parallel_size=1)
        self.od_config: Any = SimpleNamespace(
            parallel_config=parallel, enable_layerwise_offload=False, cache_backend=None
        )
        self.calls: list[int] = []

    def transformer(self, extra_branches: Any = (), **branch: Any) -> Any:  # type: ignore[override]
        """Record the number of branches of this call."""
        branches = [branch, *extra_branches]
        self.calls.append(len(branches))
        flows = [torch.full((1, 2), 10.0 * one["number"] + bool(one.get("skip_layers"))) for one in branches]
        return flows if extra_branches else flows[0]


@pytest.mark.parametrize(("batched", "calls"), [(True, [3]), (False, [1, 1, 1])])
def test_a_port_may_use_vllm_omnis_mixin(batched: bool, calls: list[int]) -> None:
    pipeline = OwnMixin(batched=batched)
    config = SkipLayerGuidanceConfig(skip_layers=(1,), scale=2.0, uncond_skip_layers=(2,))
    guided = pipeline.predict_noise_with_slg(
        True,
        4.0,
        {"number": 3},
        {"number": 1},
        slg_config=config,
        active=[True],
        sigmas=[0.5],
        latents=torch.zeros(1, 2),
    )
    assert pipeline.calls == calls
    assert guided.tolist() == [[11 + 4 * (30 - 11) + 2 * (30 - 31)] * 2]
