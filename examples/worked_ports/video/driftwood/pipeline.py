"""driftwood on vLLM-Omni: a prompt to a video.

Shapes: T bytes of a text, C latent channels, F latent frames, h and w latent rows and columns,
H and W pixels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from port_kit.pipeline.prompt_pipeline import PromptPipeline
from port_kit.pipeline.prompt_request import PromptOptions
from port_kit.pipeline.request_state import DenoiseState, PreparedRequest, draw_noise
from port_kit.port import Component
from torch import Tensor

from driftwood import config
from driftwood.model.projector import SCALE
from driftwood.weights import COMPONENTS


class DriftwoodPipeline(PromptPipeline):
    """What is special about the model; the base class serves requests."""

    components: ClassVar[tuple[Component, ...]] = COMPONENTS
    options: ClassVar[PromptOptions] = config.OPTIONS
    fps: ClassVar[int] = config.FPS

    def encode(self, prepared: PreparedRequest) -> list[Tensor]:
        """Return the bytes (1, T) of the prompt and of the negative prompt."""
        texts = (prepared.request.prompt, prepared.request.negative_prompt)
        codes = [(list(text.encode()) + [0] * config.TEXT_LENGTH)[: config.TEXT_LENGTH] for text in texts]
        return [torch.tensor([code], device=self.device) for code in codes]

    def initial_latents(self, prepared: PreparedRequest) -> dict[str, Tensor]:
        """Return noise (1, C, F, h, w), float32."""
        request, scale = prepared.request, SCALE
        frames = 1 + (request.frames - 1) // self.options.frame_step
        shape = (config.TRANSFORMER_CONFIG["channels"], frames, request.height // scale, request.width // scale)
        return {"video": draw_noise(shape, request.seed, device=self.device, dtype=torch.float32)}

    def branches(self, state: DenoiseState) -> list[dict[str, Any]]:
        """Return the transformer's arguments with the prompt and with the negative prompt."""
        noisy = {"latents": state.latents["video"].to(self.dtype), "time": state.timestep.reshape(1)}
        return [{**noisy, "text": text} for text in state.conditioning]

    def decode(self, state: DenoiseState) -> dict[str, Tensor]:
        """Return the frames (1, 3, frames, H, W) in [-1, 1]."""
        return {"video": self.projector(state.latents["video"].to(self.dtype))}
