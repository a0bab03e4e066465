"""Base class of the pipelines of Wan-derived models with a video and an audio stream.

Shapes: B = 1 batch, C latent channels, F latent frames, h and w latent cells (16 pixels), L audio latents, T text
tokens, D text width, n reference images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm_omni.diffusion.models.interface import SupportAudioOutput

from port_kit.models.wan.components.text_encoder import load_tokenizer
from port_kit.models.wan.pipeline.prompts import tokenize
from port_kit.models.wan.pipeline.request import (
    AUDIO_LATENT_CHANNELS,
    AUDIO_SAMPLE_RATE,
    DEFAULT_STEPS,
    FPS,
    MAX_LATENTS,
    MAX_TEXT_TOKENS,
    NOISES,
    NOT_READ,
    VIDEO_LATENT_CHANNELS,
    VIDEO_SPATIAL_STRIDE,
    FusionRequest,
    LatentLengths,
)
from port_kit.models.wan.pipeline.scheduler import Scheduler, build_scheduler
from port_kit.models.wan.transformer.modality_io import TextContext
from port_kit.models.wan.weights.lora_names import WAN_NAMES
from port_kit.parallel.cuda_graphs import graphs_are_possible
from port_kit.pipeline.base import PortPipeline
from port_kit.pipeline.model_index import ModelIndex
from port_kit.pipeline.request_state import DenoiseState, PreparedRequest, draw_noise


@dataclass(frozen=True)
class EncodedConditioning:
    """Encoded texts and clean references of a request, equal for all steps.

    Attributes:
        texts: the prompt for the video and for the audio.
        negatives: the negative prompts for the video and for the audio.
        images: latents (1, C, n, h, w); n = 0 without reference images.
        audios: latents (1, L, C) of all reference audios in order; L = 0 without any.
        audio_reference_lengths: latents of each reference audio.
    """

    texts: tuple[TextContext, TextContext]
    negatives: tuple[TextContext, TextContext]
    images: Tensor
    audios: Tensor
    audio_reference_lengths: tuple[int, ...]


class FusionPipeline(PortPipeline, SupportAudioOutput):
    """Pipeline of a port with the fusion transformer.

    A port implements :meth:`preprocess`, :meth:`branches` and ``combine_multi_branch_cfg_noise``, and
    :meth:`reapply_conditioning` if it writes into the latents between steps.

    Attributes:
        index: values of ``model_index.json``.
        lengths: lengths of the output in latents.
    """

    batches_branches: ClassVar[bool] = True
    fps: ClassVar[int] = FPS
    audio_sample_rate: ClassVar[int] = AUDIO_SAMPLE_RATE
    default_num_inference_steps: ClassVar[int] = DEFAULT_STEPS
    lora_names: ClassVar[tuple[tuple[str, str], ...]] = WAN_NAMES
    prompt_fields: ClassVar[tuple[str, ...]] = ("video_negative_prompt", "audio_negative_prompt")
    tensor_options: ClassVar[Collection[str]] = NOISES
    not_read: ClassVar[Mapping[str, str]] = NOT_READ
    #: Latent cells and audio latents per call, 4 cells per token. A state of the default size (89,280 and 157) fills a
    #: device by itself: batching such states would cost memory and gain no time.
    max_batch_size: ClassVar[int] = 131_072
    #: Output of the dummy run: the shortest one that runs every module.
    warm_up: ClassVar[LatentLengths] = LatentLengths(video=2, audio=10)
    dummy_run_num_frames: ClassVar[int] = warm_up.frames

    def read_directory(self, model: str) -> None:
        """Read ``model_index.json`` and the tokenizer."""
        self.index = ModelIndex.read(model)
        lengths = (self.index.integer(f"{kind}_latent_length", 1, MAX_LATENTS) for kind in ("video", "audio"))
        self.lengths = LatentLengths(*lengths)
        self.tokenizer = load_tokenizer(f"{model}/tokenizer")

    def setup_compile(self) -> None:
        """Use CUDA graphs where they are possible; vLLM-Omni calls this unless ``enforce_eager`` is set."""
        if graphs_are_possible(self.od_config):
            self.transformer.use_cuda_graphs(self.device)

    @property
    def fixed_frames(self) -> int:
        """Number of frames of every video."""
        return self.lengths.frames

    @abstractmethod
    def preprocess(
        self, prompt: Any, sampling: Any, lengths: LatentLengths
    ) -> tuple[FusionRequest, Sequence[Tensor], Sequence[Tensor]]:
        """Return the checked request, its images (3, H, W) in [-1, 1] and its audios (16000,), float32.

        Raises:
            InputError: the request cannot be served.
        """

    def prepare(self, prompt: Any, sampling: Any, *, is_dummy_run: bool = False) -> PreparedRequest:
        """Check a request, decode its media and tokenize its texts.

        Raises:
            InputError: the request cannot be served.
        """
        lengths = self.warm_up if is_dummy_run else self.lengths
        request, images, audios = self.preprocess(prompt, sampling, lengths)
        texts = (request.prompt, request.video_negative_prompt, request.audio_negative_prompt)
        tokens = [tokenize(self.tokenizer, text, limit=MAX_TEXT_TOKENS) for text in texts]
        return PreparedRequest(request, lengths, tokens, images, audios)

    def encode(self, prepared: PreparedRequest) -> EncodedConditioning:
        """Encode texts and references."""
        cells = (side // VIDEO_SPATIAL_STRIDE for side in (prepared.request.height, prepared.request.width))
        images = [torch.empty(1, VIDEO_LATENT_CHANNELS, 0, *cells, device=self.device)]
        images += [self.vae.encode(image[None, :, None].to(self.device)) for image in prepared.images]
        audios = [self.audio_vae.encode(audio[None].to(self.device)).transpose(1, 2) for audio in prepared.audios]
        positive, video_negative, audio_negative = (self.encode_prompt(ids) for ids in prepared.tokens)
        no_audio = torch.empty(1, 0, AUDIO_LATENT_CHANNELS, device=self.device)
        return EncodedConditioning(
            texts=(TextContext(positive), TextContext(positive)),
            negatives=(TextContext(video_negative), TextContext(audio_negative)),
            images=torch.cat(images, dim=2).to(self.dtype),
            audios=torch.cat((no_audio, *audios), dim=1).to(self.dtype),
            audio_reference_lengths=tuple(audio.shape[1] for audio in audios),
        )

    def encode_prompt(self, token_ids: list[int]) -> Tensor:
        """Return the text encoder's states (1, T, D). vLLM-Omni's prompt cache wraps this method."""
        ids = torch.tensor([token_ids], device=self.device)
        return self.text_encoder(ids, torch.ones_like(ids)).to(self.dtype)

    def initial_latents(self, prepared: PreparedRequest) -> dict[str, Tensor]:
        """Return noise for the outputs and the references; each modality has a generator with the same seed."""
        request = prepared.request
        shapes = dict(zip(("video", "audio"), request.noise_shapes(prepared.lengths), strict=True))
        given = {"video": request.video_noise, "audio": request.audio_noise}
        return {
            name: draw_noise(shape, request.seed, device=self.device, dtype=self.dtype)
            if given[name] is None
            else given[name][None].to(self.device, self.dtype)
            for name, shape in shapes.items()
        }

    def build_solver(self, request: Any) -> Scheduler:
        """Build the solver that the request selects."""
        return build_scheduler(request.solver, steps=request.steps, shift=request.shift)

    def batch_size(self, state: DenoiseState) -> int:
        """Return the latent cells of the video and the latents of the audio."""
        return state.latents["video"][:, 0].numel() + state.latents["audio"][:, :, 0].numel()

    def decode(self, state: DenoiseState) -> dict[str, Tensor]:
        """Return ``video`` (1, 3, frames, H, W) in [-1, 1] and ``audio`` (samples,), without the references."""
        lengths = state.prepared.lengths
        mel = self.audio_vae.decode(state.latents["audio"][:, : lengths.audio].transpose(1, 2))
        video = self.vae.decode(state.latents["video"][:, :, : lengths.video])
        return {"video": video, "audio": self.vocoder(mel).flatten()}
