"""A small pipeline around one tower: seeded latents of the shape ``latents`` in ``extra_args``, one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm_omni.diffusion.data import DiffusionOutput
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

from port_kit.models.wan.transformer.config import TowerConfig
from port_kit.models.wan.transformer.tower import WanTower
from port_kit.models.wan.weights.transformer_rules import AUDIO_TOWER, VIDEO_TOWER
from tests.parallel.transformer_pipeline import TransformerOnlyPipeline


class TowerPipeline(TransformerOnlyPipeline):
    """A pipeline whose transformer is a tower."""

    def build_transformer(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the tower, and choose its rules."""
        tower = TowerConfig.from_dict(config, "tower")
        self.rules = VIDEO_TOWER if tower.modality == "video" else AUDIO_TOWER
        return WanTower(tower)

    def forward(self, req: DiffusionRequestBatch, **_: Any) -> DiffusionOutput:
        """Predict one flow."""
        random = torch.Generator().manual_seed(1)
        latents = torch.randn(*req.sampling_params.extra_args["latents"], generator=random)
        text = torch.randn(1, 9, self.transformer.config.text_dim, generator=random)
        return DiffusionOutput(output=self.transformer(latents, torch.tensor([937]), text))
