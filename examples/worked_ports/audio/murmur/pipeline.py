"""murmur on vLLM-Omni: a prompt to audio.

Shapes: T bytes of a text, C latent channels, L latent positions,
S samples.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from port_kit.pipeline.prompt_pipeline import PromptPipeline
from port_kit.pipeline.prompt_request import PromptOptions
from port_kit.pipeline.request_state import DenoiseState, PreparedRequest, draw_noise
from port_kit.port import Component
from torch import Tensor

from murmur import config
from murmur.weights import COMPONENTS


class MurmurPipeline(PromptPipeline):
    """What is special about the model; the base class serves requests."""

    components: ClassVar[tuple[Component, ...]] = COMPONENTS
    options: ClassVar[PromptOptions] = config.OPTIONS
    audio_sample_rate: ClassVar[int] = config.SAMPLE_RATE

    def encode(self, prepared: PreparedRequest) -> list[Tensor]:
        """Return the bytes (1, T) of the prompt and of the negative prompt."""
        texts = (prepared.request.prompt, prepared.request.negative_prompt)
        codes = [(list(text.encode()) + [0] * config.TEXT_LENGTH)[: config.TEXT_LENGTH] for text in texts]
        return [torch.tensor([code], device=self.device) for code in codes]

    def initial_latents(self, prepared: PreparedRequest) -> dict[str, Tensor]:
        """Return noise (1, C, L), float32."""
        request = prepared.request
        length = max(1, round(request.seconds * config.SAMPLE_RATE / config.HOP))
        shape = (config.TRANSFORMER_CONFIG["latent"], length)
        return {"audio": draw_noise(shape, request.seed, device=self.device, dtype=torch.float32)}

    def branches(self, state: DenoiseState) -> list[dict[str, Any]]:
        """Return the transformer's arguments with the prompt and with the negative prompt."""
        noisy = {"latents": state.latents["audio"].to(self.dtype), "time": state.timestep.reshape(1)}
        return [{**noisy, "text": text} for text in state.conditioning]

    def decode(self, state: DenoiseState) -> dict[str, Tensor]:
        """Return the samples (S,) in [-1, 1]; (2, S) for stereo."""
        return {"audio": self.vocoder(state.latents["audio"].to(self.dtype))[0]}
