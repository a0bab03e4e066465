"""DreamID-Omni on vLLM-Omni: reference pictures and voices, a prompt, four-branch guidance, video with sound.

Shapes: B = 1 batch, C latent channels, F latent frames with the reference pictures last, h and w latent cells (16
pixels), L audio latents with the reference voices last, T text tokens, D text width, n references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm_omni.diffusion.cancellation import check_request_cancellation
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.models.interface import (
    SupportAudioInput,
    SupportAudioOutput,
    SupportImageInput,
    SupportsComponentDiscovery,
)
from vllm_omni.diffusion.models.progress_bar import ProgressBarMixin
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.errors import OmniClientError

from port_kit.errors import InputError
from port_kit.models.dreamid_omni import config
from port_kit.models.dreamid_omni.weights import COMPONENTS
from port_kit.models.wan_fusion.caching import arrange_cache
from port_kit.models.wan_fusion.loading import build_components, load_component_weights, read_json, weights_sources
from port_kit.models.wan_fusion.media import envelope, to_frames
from port_kit.models.wan_fusion.prompts import strip_tags, tokenize
from port_kit.models.wan_fusion.references import cut_voice, fit_image, load_image, load_voice
from port_kit.models.wan_fusion.scheduler import build_scheduler
from port_kit.models.wan_fusion.stems import Text
from port_kit.models.wan_fusion.text_encoder import load_tokenizer


@dataclass(frozen=True)
class Job:
    """A request whose every part has been read and checked; nothing after it can be the caller's fault.

    Attributes:
        request: its numbers and texts.
        lengths: of the clip.
        pictures: float32 (3, H, W) each, in [-1, 1].
        voices: float32 (16000,) each.
        tokens: ids of the prompt, the video's negative prompt and the sound's negative prompt.
    """

    request: config.GenerationRequest
    lengths: config.Lengths
    pictures: Sequence[Tensor]
    voices: Sequence[Tensor]
    tokens: tuple[list[int], list[int], list[int]]


@dataclass(frozen=True)
class Conditions:
    """What every step is given: texts, which keep their keys and values over the steps, and clean references.

    Attributes:
        texts: the prompt for the video and for the sound.
        negatives: the negative prompts for the video and for the sound.
        pictures: latents (1, C, n, h, w).
        voices: latents (1, L, C), one after the other.
        voice_lengths: latents of each voice.
    """

    texts: tuple[Text, Text]
    negatives: tuple[Text, Text]
    pictures: Tensor
    voices: Tensor
    voice_lengths: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One finished denoising step, for whoever watches (see :attr:`DreamIDOmniPipeline.on_step`)."""

    index: int
    guided_video: Tensor
    guided_audio: Tensor
    video: Tensor
    audio: Tensor


class DreamIDOmniPipeline(
    nn.Module,
    CFGParallelMixin,
    ProgressBarMixin,
    SupportImageInput,
    SupportAudioInput,
    SupportAudioOutput,
    SupportsComponentDiscovery,
):
    """The pipeline as vLLM-Omni's registry builds it: empty, then filled by the standard loader.

    Attributes:
        on_step: called after every denoising step; None by default. Parity checks watch latents through it.
    """

    _dit_modules: ClassVar[list[str]] = ["transformer"]
    _encoder_modules: ClassVar[list[str]] = ["text_encoder"]
    _vae_modules: ClassVar[list[str]] = ["vae", "audio_vae", "vocoder"]
    _resident_modules: ClassVar[list[str]] = []
    support_image_input: ClassVar[bool] = True
    support_audio_input: ClassVar[bool] = True
    support_audio_output: ClassVar[bool] = True
    supports_request_cancellation: ClassVar[bool] = True
    color_format: ClassVar[str] = "RGB"
    audio_sample_rate: ClassVar[int] = config.AUDIO_SAMPLE_RATE
    default_num_inference_steps: ClassVar[int] = config.DEFAULT_STEPS
    #: The start-up run makes the shortest clip that touches every module: 2 latent frames.
    warm_up: ClassVar[config.Lengths] = config.Lengths(video=2, audio=10)
    dummy_run_num_frames: ClassVar[int] = warm_up.frames

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.od_config = od_config
        self.dtype = od_config.dtype
        self.device = get_local_device()
        index = read_json(od_config.model, "model_index.json")
        self.lengths = config.Lengths(index["video_latent_length"], index["audio_latent_length"])
        for name, module in build_components(od_config.model, COMPONENTS).items():
            self.add_module(name, module)
        arrange_cache(self.transformer, od_config, passes=config.GUIDANCE_PASSES)
        self.tokenizer = load_tokenizer(f"{od_config.model}/tokenizer")
        self.weights_sources = weights_sources(od_config.model, COMPONENTS)
        self.on_step: Callable[[Step], None] | None = None
        self.eval().requires_grad_(False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill all components; see :func:`~port_kit.models.wan_fusion.loading.load_component_weights`."""
        return load_component_weights(self, COMPONENTS, weights, self.od_config.model)

    def forward(self, req: DiffusionRequestBatch, **_: Any) -> DiffusionOutput:
        """Serve one request. A request that cannot be served comes back as a client's error, not as a failure.

        Returns:
            ``output`` with ``video`` uint8 (frames, H, W, 3) and ``audio`` float32 (samples,).
        """
        try:
            job = self.prepare(req)
        except InputError as error:
            return DiffusionOutput.from_exception(OmniClientError(str(error)))
        video, audio = self.generate(job)
        return DiffusionOutput(output={"video": to_frames(video), "audio": audio.float()})

    def prepare(self, req: DiffusionRequestBatch) -> Job:
        """Check a request and read its references, before any model runs.

        Raises:
            InputError: the request cannot be served.
        """
        lengths = self.warm_up if req.is_dummy_run() else self.lengths
        request = config.parse_request(req.prompts[0], req.sampling_params, lengths)
        pictures = [load_image(image, name=f"picture {i}") for i, image in enumerate(request.images, 1)]
        voices = [(load_voice(voice, name=f"voice {i}"), f"voice {i}") for i, voice in enumerate(request.voices, 1)]
        texts = (strip_tags(request.prompt), request.video_negative_prompt, request.audio_negative_prompt)
        positive, video_negative, audio_negative = (
            tokenize(self.tokenizer, text, limit=config.MAX_TEXT_TOKENS) for text in texts
        )
        return Job(
            request=request,
            lengths=lengths,
            pictures=[fit_image(picture, request.height, request.width) for picture in pictures],
            voices=[cut_voice(samples, name=name) for samples, name in voices],
            tokens=(positive, video_negative, audio_negative),
        )

    def generate(self, job: Job) -> tuple[Tensor, Tensor]:
        """Run the model: references and texts in, video (1, 3, frames, H, W) in [-1, 1] and sound (samples,) out."""
        conditions = self.conditions(job)
        video, audio = self.noise(job)
        video, audio = self.diffuse(video, audio, conditions, job.request)
        mel = self.audio_vae.decode(audio[:, : job.lengths.audio].transpose(1, 2))
        return self.vae.decode(video[:, :, : job.lengths.video]), self.vocoder(mel).flatten()

    def encode_prompt(self, token_ids: list[int]) -> Tensor:
        """Return the text encoder's states (1, T, D). vLLM-Omni's prompt cache wraps this method."""
        ids = torch.tensor([token_ids], device=self.device)
        return self.text_encoder(ids, torch.ones_like(ids)).to(self.dtype)

    def conditions(self, job: Job) -> Conditions:
        """Encode references and texts, once a request."""
        pictures = [self.vae.encode(picture[None, :, None].to(self.device)) for picture in job.pictures]
        voices = [self.audio_vae.encode(voice[None].to(self.device)).transpose(1, 2) for voice in job.voices]
        positive, video_negative, audio_negative = (self.encode_prompt(ids) for ids in job.tokens)
        return Conditions(
            texts=(Text(positive), Text(positive)),
            negatives=(Text(video_negative), Text(audio_negative)),
            pictures=torch.cat(pictures, dim=2).to(self.dtype),
            voices=torch.cat(voices, dim=1).to(self.dtype),
            voice_lengths=tuple(voice.shape[1] for voice in voices),
        )

    def noise(self, job: Job) -> tuple[Tensor, Tensor]:
        """Draw both latents, references' places included, each from its own generator with the same seed."""
        given, (video_shape, audio_shape) = job.request, job.request.noise_shapes(job.lengths)
        video = self._draw(video_shape, given.seed, given.video_noise)
        return video, self._draw(audio_shape, given.seed, given.audio_noise)

    def _draw(self, shape: tuple[int, ...], seed: int, given: Tensor | None) -> Tensor:
        if given is not None:
            return given[None].to(self.device, self.dtype)
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn((1, *shape), generator=generator, device=self.device, dtype=self.dtype)

    def diffuse(
        self, video: Tensor, audio: Tensor, conditions: Conditions, request: config.GenerationRequest
    ) -> tuple[Tensor, Tensor]:
        """Denoise (1, C, F, h, w) and (1, L, C) together.

        The references' places hold clean references in what the transformer sees and noise in what the solvers
        step: the whole tensors are stepped, as in the reference, and their tails are dropped by the caller.
        """
        video_solver, audio_solver = (
            build_scheduler(request.solver, steps=request.steps, shift=request.shift) for _ in range(2)
        )
        # One copy to the device for all steps; the solvers keep theirs on the CPU, so that no step waits.
        timesteps = video_solver.timesteps.to(self.device)
        for index, t in enumerate(self.progress_bar(video_solver.timesteps)):
            check_request_cancellation()
            branches = self._branches(video, audio, timesteps[index], conditions)
            guided = self.predict_noise_with_multi_branch_cfg(True, asdict(request.scales), branches)
            video = video_solver.step(guided[0], t, video, return_dict=False)[0]
            audio = audio_solver.step(guided[1], t, audio, return_dict=False)[0]
            if self.on_step is not None:
                self.on_step(Step(index, guided[0], guided[1], video, audio))
        return video, audio

    @staticmethod
    def _branches(video: Tensor, audio: Tensor, timestep: Tensor, given: Conditions) -> list[dict[str, Any]]:
        """Return the four passes of a step: full; without the text; without the pictures; without the voices.

        References that a pass goes without are zeroed, not removed: they keep their places and positions. Of the
        last two passes only the modality whose references are missing is used.
        """
        frames, tokens = given.pictures.shape[2], given.voices.shape[1]

        def put(
            pictures: Tensor, voices: Tensor, texts: tuple[Text, Text], unused: str | None = None
        ) -> dict[str, Any]:
            return {
                "video": torch.cat((video[:, :, :-frames], pictures), dim=2),
                "audio": torch.cat((audio[:, :-tokens], voices), dim=1),
                "timestep": timestep,
                "video_text": texts[0],
                "audio_text": texts[1],
                "video_reference_frames": frames,
                "audio_reference_lengths": given.voice_lengths,
                "unused": unused,
            }

        return [
            put(given.pictures, given.voices, given.texts),
            put(given.pictures, given.voices, given.negatives),
            put(torch.zeros_like(given.pictures), given.voices, given.texts, unused="audio"),
            put(given.pictures, torch.zeros_like(given.voices), given.texts, unused="video"),
        ]

    def predict_noise(self, **branch: Any) -> tuple[Tensor, Tensor]:
        """Run one pass; the CFG mixin spreads passes over ranks."""
        return self.transformer(**branch)

    def combine_multi_branch_cfg_noise(
        self, predictions: list[Any], true_cfg_scale: Any, cfg_normalize: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Guide each modality by the text and by its own references.

        Args:
            predictions: (video, audio) of the four passes, in the order of :meth:`_branches`.
            true_cfg_scale: :class:`~port_kit.models.dreamid_omni.config.GuidanceScales` as a dict.
            cfg_normalize: not used by this model.
        """
        full, no_text, no_pictures, no_voices = predictions
        scale = config.GuidanceScales(**true_cfg_scale)
        return (
            _guide(full[0], no_text[0], no_pictures[0], scale.video_cfg_scale, scale.video_ref_cfg_scale),
            _guide(full[1], no_text[1], no_voices[1], scale.audio_cfg_scale, scale.audio_ref_cfg_scale),
        )


def _guide(full: Tensor, no_text: Tensor, no_reference: Tensor, text_scale: float, reference_scale: float) -> Tensor:
    return no_text + text_scale * (full - no_text) + reference_scale * (full - no_reference)


def get_post_process_func(od_config: OmniDiffusionConfig) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    """Return what turns a worker's output into vLLM-Omni's payload; runs in the engine's process."""

    def post_process(output: dict[str, Tensor]) -> dict[str, Any]:
        return envelope(output, fps=config.FPS, sample_rate=config.AUDIO_SAMPLE_RATE)

    return post_process
