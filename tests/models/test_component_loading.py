"""Loading reads the files itself: the same bits as through vLLM-Omni's loader, for every component."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.config import LoadConfig
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

from port_kit.models.dreamid_omni.weights import COMPONENTS
from port_kit.pipeline.loading import build_components, load_component_weights, weights_sources
from port_kit.port import resolve
from port_kit.remap import load_components
from port_kit.runtime.single_process import single_rank


class Owner(nn.Module):
    """The components as the loader sees them in a pipeline, and the way by which they are filled."""

    _dit_modules = ("transformer",)

    def __init__(self, config: Any, model: Path, way: str) -> None:
        super().__init__()
        self.od_config, self.model, self.way = config, model, way
        for name, module in build_components(model, COMPONENTS).items():
            self.add_module(name, module)
        self.weights_sources = weights_sources(model, COMPONENTS)
        self.requires_grad_(False)
        for parameter in self.parameters():
            parameter.data.fill_(7)

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> set[str]:
        if self.way == "port":
            return load_component_weights(self, COMPONENTS, weights, self.model)
        parts: Any = {part.name: (getattr(self, part.name), resolve(part.rules)) for part in COMPONENTS}
        return load_components(parts, weights, model=self.model)


def load(model: Path, way: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    with single_rank(dtype=dtype, device=device) as config:
        config.model = str(model)
        owner = Owner(config, model, way)
        DiffusersPipelineLoader(LoadConfig(), od_config=config).load_weights(owner)
        return {name: value.cpu() for name, value in owner.state_dict().items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and value.equal(other[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_component_has_the_same_bits(dreamid_model: Path, dtype: torch.dtype) -> None:
    assert_same_bits(load(dreamid_model, "port", dtype), load(dreamid_model, "stream", dtype))


@pytest.mark.gpu
def test_on_a_gpu_too(dreamid_model: Path) -> None:
    expected = load(dreamid_model, "stream", torch.bfloat16)
    for way in ("stream", "port"):
        assert_same_bits(load(dreamid_model, way, torch.bfloat16, "cuda"), expected)
