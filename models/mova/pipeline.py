"""MOVA on vLLM-Omni: a first frame and a prompt to a video with audio.

Shapes: C channels of the video latents, F latent frames, h and w latent cells (8 pixels), L audio latents (50 Hz), c
their channels, T text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.models.interface import SupportAudioOutput, SupportImageInput

from port_kit.models.mova import config
from port_kit.models.mova.model.audio_vae import AudioVAEConfig
from port_kit.models.mova.model.scheduler import FlowEuler, Schedule
from port_kit.models.mova.weights import COMPONENTS
from port_kit.models.wan.components.text_encoder import load_tokenizer
from port_kit.models.wan.pipeline.prompts import tokenize
from port_kit.models.wan.transformer.modality_io import TextContext
from port_kit.models.wan.weights.lora_names import DIFFUSERS_NAMES
from port_kit.parallel.cfg_batching import EXPERT
from port_kit.pipeline.experts import HIGH_NOISE, LOW_NOISE, ExpertContext, NoiseExperts
from port_kit.pipeline.images import crop_image
from port_kit.pipeline.model_index import ModelIndex, incomplete, read_json
from port_kit.pipeline.prompt_pipeline import PromptPipeline
from port_kit.pipeline.prompt_request import GuidanceScale, PromptRequest
from port_kit.pipeline.request_state import DenoiseState, PreparedRequest
from port_kit.port import Component

#: Channels of the mask in front of the condition.
MASK_CHANNELS = 4


@dataclass(frozen=True)
class Text:
    """An encoded text with its projections: by each video tower, and by the audio tower.

    Attributes:
        video: of the video tower that runs.
        audio: of the audio tower.
    """

    video: ExpertContext[TextContext]
    audio: TextContext


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of a request, the same in all denoising steps.

    Attributes:
        positive: the prompt.
        negative: the negative prompt.
        first_frame: mask and latents of a clip that is empty after its first frame, float32
            (1, :data:`MASK_CHANNELS` + C, F, h, w).
    """

    positive: Text
    negative: Text
    first_frame: Tensor


class MOVAPipeline(PromptPipeline, SupportAudioOutput, SupportImageInput):
    """Pipeline with a video tower per noise level; the first frame is in further input channels of all steps.

    Attributes:
        experts: choice of the video tower.
        schedule: noise levels.
        audio: sizes of the audio latents.
    """

    components: ClassVar[tuple[Component, ...]] = COMPONENTS
    options = config.OPTIONS
    fps: ClassVar[int] = config.FPS
    audio_sample_rate: ClassVar[int] = config.SAMPLE_RATE
    lora_folders: ClassVar[Mapping[str, str]] = {
        "transformer": "video_dit",
        "transformer_2": "video_dit_2",
        "audio_transformer": "audio_dit",
        "bridge": "dual_tower_bridge",
    }
    lora_names: ClassVar[tuple[tuple[str, str], ...]] = DIFFUSERS_NAMES
    not_read: ClassVar[Mapping[str, str]] = {
        "boundary_ratio": "the model directory has the noise at which the second transformer takes over",
        "guidance_scale_2": "one guidance scale applies to both transformers",
    }
    #: In latent values. A clip of 360p has 2.8 million and fills a device by itself.
    max_batch_size: ClassVar[int] = 1_000_000

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__(od_config=od_config, prefix=prefix)
        for name in (HIGH_NOISE, LOW_NOISE):
            getattr(self, name).join(self.audio_transformer, self.bridge)

    def read_directory(self, model: str) -> None:
        """Read the noise levels, the sizes of latents, the default size and the tokenizer."""
        index = ModelIndex.read(model)
        height, width = (
            index.integer(name, self.options.size_multiple, self.options.max_side) for name in ("height", "width")
        )
        self.options = replace(self.options, height=height, width=width)
        self.schedule = Schedule.from_dict(read_json(model, "scheduler/scheduler_config.json"))
        self.experts = NoiseExperts(index.real("boundary_ratio", 0.0, 1.0) * self.schedule.training_steps)
        self.audio = AudioVAEConfig.from_dict(read_json(model, "audio_vae/config.json"))
        if self.audio.sample_rate != self.audio_sample_rate:
            raise incomplete(f"{model}/audio_vae has a sample rate of {self.audio.sample_rate} Hz, not 48000")
        self.tokenizer = load_tokenizer(f"{model}/tokenizer")

    def setup_compile(self) -> None:
        """Compile nothing: the blocks have fused kernels, and their sequences are too long for CUDA graphs to pay."""

    def fit_image(self, image: Image.Image, height: int, width: int) -> Tensor:
        """Return the first frame, cropped to the aspect ratio of the video."""
        return crop_image(image, height, width)

    def prepare(self, prompt: Any, sampling: Any, *, is_dummy_run: bool = False) -> PreparedRequest:
        """Check a request, fit its first frame and tokenize its texts.

        Raises:
            InputError: the request cannot be served.
        """
        prepared = super().prepare(prompt, sampling, is_dummy_run=is_dummy_run)
        texts = (prepared.request.prompt, prepared.request.negative_prompt)
        tokens = [tokenize(self.tokenizer, text, limit=config.MAX_TEXT_TOKENS) for text in texts]
        return replace(prepared, tokens=tokens)

    def encode(self, prepared: PreparedRequest) -> Conditioning:
        """Encode the texts and the first frame."""
        positive, negative = (self._text(self.encode_prompt(ids)) for ids in prepared.tokens)
        return Conditioning(positive, negative, self.encode_first_frame(prepared.images[0], prepared.request.frames))

    def encode_prompt(self, token_ids: list[int]) -> Tensor:
        """Return the text encoder's states (1, T, D). vLLM-Omni's prompt cache wraps this method."""
        ids = torch.tensor([token_ids], device=self.device)
        return self.text_encoder(ids, torch.ones_like(ids)).to(self.dtype)

    def encode_first_frame(self, image: Tensor, frames: int) -> Tensor:
        """Return mask and latents of a clip whose frames after the first one are gray; see :class:`Conditioning`."""
        clip = image.new_zeros(1, 3, frames, *image.shape[1:], device=self.device)
        clip[:, :, 0] = image
        latents = self.vae.encode(clip)
        mask = torch.zeros_like(latents[:, :1]).repeat(1, MASK_CHANNELS, 1, 1, 1)
        mask[:, :, 0] = 1
        return torch.cat((mask, latents), 1)

    def initial_latents(self, prepared: PreparedRequest) -> dict[str, Tensor]:
        """Return noise in float32: one generator draws the video's, then the audio's."""
        request: PromptRequest = prepared.request
        generator = torch.Generator(self.device).manual_seed(request.seed)
        space, time = self.vae.spatial_factor, self.vae.temporal_factor
        frames = (request.frames - 1) // time + 1
        cells = frames, request.height // space, request.width // space
        draw = partial(torch.randn, generator=generator, device=self.device, dtype=torch.float32)
        video = draw((1, self.transformer.config.out_channels, *cells))
        audio = draw((1, self.audio.latent_dim, self.audio_length(request.frames)))
        return {"video": video, "audio": audio.transpose(1, 2).contiguous()}

    def audio_length(self, frames: int) -> int:
        """Return the number of audio latents of a clip, whose last one may reach beyond its end."""
        samples = int(self.audio.sample_rate * frames / self.fps)
        return (samples - 1) // self.audio.hop + 1

    def build_solver(self, request: Any) -> FlowEuler:
        """Return Euler steps with the levels of the model directory."""
        return FlowEuler(self.schedule, request.steps)

    def branches(self, state: DenoiseState) -> list[dict[str, Any]]:
        """Return the guidance branches: prompt and negative prompt, or the prompt alone at scale 1.

        A cache needs as many branches in every step of every request.
        """
        given: Conditioning = state.conditioning
        expert = self.experts.at(float(state.solvers["video"].timesteps[state.index]))
        shared = {
            EXPERT: expert,
            "video": torch.cat((state.latents["video"], given.first_frame), 1).to(self.dtype),
            "audio": state.latents["audio"].to(self.dtype),
            "timestep": state.timestep,
            "fps": float(self.fps),
        }
        is_guided = state.prepared.request.scales.guidance_scale != 1.0 or self.od_config.cache_backend == "cache_dit"
        texts = (given.positive, given.negative) if is_guided else (given.positive,)
        return [{**shared, "video_text": text.video.of(expert), "audio_text": text.audio} for text in texts]

    def combine_multi_branch_cfg_noise(
        self, predictions: list[Any], true_cfg_scale: Any, cfg_normalize: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Guide both modalities by the prompt, in float32.

        Args:
            predictions: (video, audio) per branch, in the order of :meth:`branches`.
            true_cfg_scale: :class:`~port_kit.pipeline.prompt_request.GuidanceScale` as a dict.
            cfg_normalize: not used by this model.
        """
        scale = GuidanceScale(**true_cfg_scale).guidance_scale
        (video, audio), *others = (tuple(flow.float() for flow in flows) for flows in predictions)
        if not others:
            return video, audio
        ((no_video, no_audio),) = others
        return no_video + scale * (video - no_video), no_audio + scale * (audio - no_audio)

    def decode(self, state: DenoiseState) -> dict[str, Tensor]:
        """Return ``video`` (1, 3, frames, H, W) in [-1, 1] and ``audio`` (samples,), up to a latent longer."""
        audio = self.audio_vae.decode(state.latents["audio"].transpose(1, 2))
        return {"video": self.vae.decode(state.latents["video"]), "audio": audio.flatten()}

    def _text(self, raw: Tensor) -> Text:
        return Text(ExpertContext(partial(TextContext, raw)), TextContext(raw))
