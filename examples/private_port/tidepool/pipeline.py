"""Tidepool's pipeline: Euler steps from noise to frames, guided by the prompt.

Shapes: T bytes of a text, F frames, H and W pixels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from port_kit.pipeline.prompt_pipeline import PromptPipeline
from port_kit.pipeline.prompt_request import PromptOptions
from port_kit.pipeline.request_state import DenoiseState, PreparedRequest, draw_noise
from port_kit.port import Component
from tidepool import config
from tidepool.weights import COMPONENTS


class TidepoolPipeline(PromptPipeline):
    """Everything that is special about the model; the base class serves requests."""

    components: ClassVar[tuple[Component, ...]] = COMPONENTS
    options: ClassVar[PromptOptions] = config.OPTIONS
    fps: ClassVar[int] = config.FPS

    def encode(self, prepared: PreparedRequest) -> list[Tensor]:
        """Return the bytes (1, T) of the prompt and of the negative prompt."""
        texts = (prepared.request.prompt, prepared.request.negative_prompt)
        return [torch.tensor([list(text.encode() or b" ")], device=self.device) for text in texts]

    def initial_latents(self, prepared: PreparedRequest) -> dict[str, Tensor]:
        """Return noise (1, 3, F, H, W), float32."""
        request = prepared.request
        shape = (3, request.frames, request.height, request.width)
        return {"video": draw_noise(shape, request.seed, device=self.device, dtype=torch.float32)}

    def branches(self, state: DenoiseState) -> list[dict[str, Any]]:
        """Return the transformer's arguments with the prompt and with the negative prompt."""
        noisy = {"video": state.latents["video"].to(self.dtype), "time": state.timestep.reshape(1)}
        return [{**noisy, "prompt": text} for text in state.conditioning]

    def decode(self, state: DenoiseState) -> dict[str, Tensor]:
        """Return the frames (1, 3, F, H, W) in [-1, 1]."""
        return {"video": 2 * state.latents["video"].sigmoid() - 1}
