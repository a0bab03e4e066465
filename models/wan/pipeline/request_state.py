"""What a request is while it is served: read and checked, encoded, denoised step by step.

Shapes: B = 1 batch, C latent channels, F latent frames, h and w latent cells (16 pixels), L audio latents, n images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from port_kit.models.wan.pipeline.request import FusionRequest, LatentLengths
from port_kit.models.wan.pipeline.scheduler import build_scheduler
from port_kit.models.wan.transformer.modality_io import TextContext


@dataclass(frozen=True)
class PreparedRequest:
    """A request whose every part has been read and checked; nothing after it can be the caller's fault.

    Attributes:
        request: its numbers and texts; of a port, its own subclass.
        lengths: of the state.
        tokens: ids of the prompt, the video's negative prompt and the audio's negative prompt.
        images: float32 (3, H, W) each, in [-1, 1].
        audios: float32 (16000,) each.
    """

    request: Any
    lengths: LatentLengths
    tokens: tuple[list[int], list[int], list[int]]
    images: Sequence[Tensor] = ()
    audios: Sequence[Tensor] = ()

    def split_outputs(self) -> list[PreparedRequest]:
        """Return one request per output video; video i has the seed of this request plus i."""
        given: FusionRequest = self.request
        requests = (replace(given, seed=given.seed + i, outputs=1) for i in range(given.outputs))
        return [replace(self, request=request) for request in requests]


@dataclass(frozen=True)
class EncodedConditioning:
    """What every step is given: texts, which keep their keys and values over the steps, and clean references.

    Attributes:
        texts: the prompt for the video and for the audio.
        negatives: the negative prompts for the video and for the audio.
        images: latents (1, C, n, h, w); n = 0 without reference images.
        audios: latents (1, L, C), one after the other; L = 0 where there are none.
        audio_reference_lengths: latents of each reference audio.
    """

    texts: tuple[TextContext, TextContext]
    negatives: tuple[TextContext, TextContext]
    images: Tensor
    audios: Tensor
    audio_reference_lengths: tuple[int, ...]


@dataclass
class DenoiseState:
    """A state between two steps; it changes with each.

    Attributes:
        prepared: what is made.
        conditioning: what every step is given.
        video: (1, C, F, h, w), places of references included.
        audio: (1, L, C), places of references included.
        solvers: the video's and the audio's; they keep their own history.
        timesteps: (steps,) int64 on the device: one copy for all steps, so that none waits for a transfer.
        index: of the next step.
    """

    prepared: PreparedRequest
    conditioning: EncodedConditioning
    video: Tensor
    audio: Tensor
    solvers: tuple[Any, Any]
    timesteps: Tensor
    index: int = 0

    @classmethod
    def begin(
        cls, prepared: PreparedRequest, conditioning: EncodedConditioning, video: Tensor, audio: Tensor
    ) -> DenoiseState:
        """Start from noise, with solvers of the request's kind; they work on the CPU, so that no step waits."""
        given: FusionRequest = prepared.request
        solvers = tuple(build_scheduler(given.solver, steps=given.steps, shift=given.shift) for _ in range(2))
        return cls(
            prepared, conditioning, video, audio, (solvers[0], solvers[1]), solvers[0].timesteps.to(video.device)
        )

    @property
    def is_done(self) -> bool:
        """Whether all steps have been made."""
        return self.index >= len(self.timesteps)

    @property
    def timestep(self) -> Tensor:
        """The next step's, 0-dim int64 on the device."""
        return self.timesteps[self.index]

    def advance(self, guided: tuple[Tensor, Tensor]) -> None:
        """Step both solvers along the guided flows, shaped as :attr:`video` and :attr:`audio`."""
        latents = []
        for solver, flow, latent in zip(self.solvers, guided, (self.video, self.audio), strict=True):
            latents.append(solver.step(flow, solver.timesteps[self.index], latent, return_dict=False)[0])
        self.video, self.audio = latents
        self.index += 1


@dataclass(frozen=True)
class Step:
    """One finished denoising step, for whoever watches a pipeline's ``on_step``."""

    index: int
    guided_video: Tensor
    guided_audio: Tensor
    video: Tensor
    audio: Tensor


def draw_noise(shape: tuple[int, ...], seed: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw (1, \\*shape) on the device, from a generator of its own: the same seed on another kind differs."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn((1, *shape), generator=generator, device=device, dtype=dtype)
