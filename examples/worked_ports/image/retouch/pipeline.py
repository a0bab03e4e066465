"""retouch on vLLM-Omni: a prompt and an image to an image.

Shapes: T bytes of a text, C latent channels, h and w latent rows and columns,
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

from retouch import config
from retouch.weights import COMPONENTS


class RetouchPipeline(PromptPipeline):
    """What is special about the model; the base class serves requests."""

    components: ClassVar[tuple[Component, ...]] = COMPONENTS
    options: ClassVar[PromptOptions] = config.OPTIONS

    def encode(self, prepared: PreparedRequest) -> list[dict[str, Tensor]]:
        """Return the bytes (1, T) of the prompt and of the negative prompt, each with the latents of the picture."""
        picture = self.codec.encode(prepared.images[0][None].to(self.device, self.dtype))
        texts = (prepared.request.prompt, prepared.request.negative_prompt)
        codes = [(list(text.encode()) + [0] * config.TEXT_LENGTH)[: config.TEXT_LENGTH] for text in texts]
        return [{"picture": picture, "text": torch.tensor([code], device=self.device)} for code in codes]

    def initial_latents(self, prepared: PreparedRequest) -> dict[str, Tensor]:
        """Return noise (1, C, h, w), float32."""
        request, scale = prepared.request, self.options.size_multiple
        shape = (config.TRANSFORMER_CONFIG["z_dim"], request.height // scale, request.width // scale)
        return {"image": draw_noise(shape, request.seed, device=self.device, dtype=torch.float32)}

    def branches(self, state: DenoiseState) -> list[dict[str, Any]]:
        """Return the transformer's arguments with the prompt and with the negative prompt."""
        noisy = {"latents": state.latents["image"].to(self.dtype), "time": state.timestep.reshape(1)}
        return [{**noisy, **given} for given in state.conditioning]

    def decode(self, state: DenoiseState) -> dict[str, Tensor]:
        """Return the image (1, 3, H, W) in [-1, 1]."""
        return {"image": self.codec(state.latents["image"].to(self.dtype))}
