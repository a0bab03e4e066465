"""vLLM-Omni's loading of shards (``hsdp_weight_load_strategy="pre_sharded"``) and the transformers of ports.

The option is rejected: vLLM-Omni supports parameters with a ``weight_loader``, which all linears of vLLM have, in three
of its own models only. These tests fail if that changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.model_loader.host_weight_plan import HostWeightPlanResult, build_checkpoint_binding_plan

from port_kit.models.wan.transformer.config import TRANSFORMER_CONFIG
from port_kit.models.wan.transformer.model import build_transformer
from port_kit.runtime.engine_options import check_options
from port_kit.runtime.single_process import single_rank
from tests.helpers import raises

TINY = {"num_layers": 2, "dim": 48, "num_heads": 4, "ffn_dim": 64, "text_dim": 16}


def plan_of(pipeline: nn.Module, folder: Path) -> HostWeightPlanResult:
    """Return vLLM-Omni's plan for the transformer of a pipeline and a checkpoint with the transformer's names."""
    source = DiffusersPipelineLoader.ComponentSource(
        model_or_path=str(folder), subfolder="transformer", revision=None, prefix="transformer."
    )
    transformer: Any = pipeline.transformer
    return build_checkpoint_binding_plan(
        pipeline,
        dit_modules=[("transformer", transformer)],
        sources=[source],
        model_path=str(folder),
        tensor_parallel_size=1,
        online_quantization=False,
    )


def test_parameters_with_a_loader_are_the_only_obstacle(tmp_path: Path) -> None:
    towers = {name: {**TRANSFORMER_CONFIG[name], **TINY} for name in ("video", "audio")}
    with single_rank(torch.float32):
        pipeline = nn.Module()
        pipeline.transformer = build_transformer({**TRANSFORMER_CONFIG, **towers})
    (tmp_path / "transformer").mkdir()
    weights = {name: torch.zeros_like(value) for name, value in pipeline.transformer.state_dict().items()}
    save_file(weights, tmp_path / "transformer" / "model.safetensors")

    refused = plan_of(pipeline, tmp_path)
    assert refused.plan is None and "requires a custom weight_loader" in str(refused.fallback_reason)

    for module in pipeline.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.data, requires_grad=False))
    accepted = plan_of(pipeline, tmp_path).plan
    assert accepted is not None and set(accepted.bindings) == {f"transformer.{name}" for name in weights}


def test_the_option_is_refused_with_the_reason() -> None:
    config = OmniDiffusionConfig(model="any", hsdp_weight_load_strategy="pre_sharded")
    with raises("engine_option", "hsdp_weight_load_strategy", "reads its shards"):
        check_options(config)
