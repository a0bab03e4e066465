"""A small pipeline around the example of joint attention, on ``audio`` and ``text`` tokens."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from vllm_omni.diffusion.data import DiffusionOutput
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

from tests.parallel.transformer_pipeline import TransformerOnlyPipeline

EXAMPLE = Path(__file__).parents[2] / "examples" / "joint_attention"


def load_example(name: str) -> ModuleType:
    """Import a module of the example, once per process."""
    known = f"joint_attention_{name}"
    if known not in sys.modules:
        spec = spec_from_file_location(known, EXAMPLE / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[known] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


class JointPipeline(TransformerOnlyPipeline):
    """A pipeline whose transformer is the example."""

    rules = load_example("weights").TRANSFORMER

    def build_transformer(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the example."""
        return load_example("transformer").build_transformer(config)

    def forward(self, req: DiffusionRequestBatch, **_: Any) -> DiffusionOutput:
        """Predict one flow."""
        extra, random = req.sampling_params.extra_args, torch.Generator().manual_seed(1)
        latents = torch.randn(2, extra["audio"], 12, generator=random)
        text = torch.randn(2, extra["text"], 20, generator=random)
        return DiffusionOutput(output=self.transformer(latents, torch.tensor([0.3, 0.8]), text))
