"""Base class of the pipelines of Wan-derived models with a video and an audio stream.

Shapes: B = 1 batch, C latent channels, F latent frames, h and w latent cells (16 pixels), L audio latents, T text
tokens, D text width, n images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from vllm_omni.diffusion.cancellation import check_request_cancellation
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.models.interface import SupportAudioOutput, SupportsComponentDiscovery
from vllm_omni.diffusion.models.progress_bar import ProgressBarMixin
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

from port_kit.errors import InputError, RemapError
from port_kit.manifest import Manifest
from port_kit.models.wan.components.text_encoder import load_tokenizer
from port_kit.models.wan.pipeline.batching import collate, group_requests
from port_kit.models.wan.pipeline.parallel_config import validate_parallel_config
from port_kit.models.wan.pipeline.prompts import tokenize
from port_kit.models.wan.pipeline.request import (
    AUDIO_LATENT_CHANNELS,
    AUDIO_SAMPLE_RATE,
    DEFAULT_STEPS,
    FPS,
    MAX_TEXT_TOKENS,
    VIDEO_LATENT_CHANNELS,
    VIDEO_SPATIAL_STRIDE,
    FusionRequest,
    LatentLengths,
    check_cached_outputs,
)
from port_kit.models.wan.pipeline.request_state import (
    DenoiseState,
    EncodedConditioning,
    PreparedRequest,
    Step,
    draw_noise,
)
from port_kit.models.wan.pipeline.step_execution import StepExecution
from port_kit.models.wan.transformer.modality_io import TextContext
from port_kit.models.wan.weights.lora_names import WAN_NAMES
from port_kit.parallel.cfg_batching import BatchedCFGMixin
from port_kit.pipeline.caching import configure_cache
from port_kit.pipeline.inputs import to_client_error
from port_kit.pipeline.loading import build_components, load_component_weights, read_json, weights_sources
from port_kit.pipeline.media import to_frames, to_omni_payload
from port_kit.port import Component, resolve
from port_kit.runtime.engine_options import check_options
from port_kit.runtime.lora import read_adapter

Admission = Callable[[OmniDiffusionRequest], OmniDiffusionRequest]


class FusionPipeline(
    StepExecution,
    nn.Module,
    BatchedCFGMixin,
    ProgressBarMixin,
    SupportAudioOutput,
    SupportsComponentDiscovery,
):
    """A pipeline as vLLM-Omni's registry builds it: empty, then filled by the standard loader.

    A request goes :meth:`prepare` → :meth:`begin` → (:meth:`predict` → :meth:`scheduler_step`) per step →
    :meth:`postprocess`. All that changes between steps is in its states, so that several requests may run at a time.
    A port implements :meth:`preprocess`, :meth:`branches` and ``combine_multi_branch_cfg_noise``, and
    :meth:`reapply_conditioning` if it writes into the latents between steps.

    Attributes:
        components: the port's weights.
        guidance_branches: of the transformer in one step.
        index: content of ``model_index.json``.
        lengths: of the state that the model makes.
        on_step: called after every denoising step; None by default. Parity checks watch latents through it.
    """

    components: ClassVar[tuple[Component, ...]]
    guidance_branches: ClassVar[int]

    _dit_modules: ClassVar[list[str]] = ["transformer"]
    _encoder_modules: ClassVar[list[str]] = ["text_encoder"]
    _vae_modules: ClassVar[list[str]] = ["vae", "audio_vae", "vocoder"]
    _resident_modules: ClassVar[list[str]] = []
    support_audio_output: ClassVar[bool] = True
    supports_request_cancellation: ClassVar[bool] = True
    supports_request_batch: ClassVar[bool] = True
    color_format: ClassVar[str] = "RGB"
    audio_sample_rate: ClassVar[int] = AUDIO_SAMPLE_RATE
    default_num_inference_steps: ClassVar[int] = DEFAULT_STEPS
    #: The start-up run makes the shortest state that touches every module: 2 latent frames.
    warm_up: ClassVar[LatentLengths] = LatentLengths(video=2, audio=10)
    dummy_run_num_frames: ClassVar[int] = warm_up.frames

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.od_config = od_config
        self.dtype = od_config.dtype
        self.device = get_local_device()
        self.read_directory(od_config.model)
        for name, module in build_components(od_config.model, self.components).items():
            self.add_module(name, module)
        configure_cache(self.transformer, od_config, branches=self.guidance_branches)
        self.weights_sources = weights_sources(od_config.model, self.components)
        self.on_step: Callable[[Step], None] | None = None
        self.eval().requires_grad_(False)

    def read_directory(self, model: str) -> None:
        """Read what :meth:`prepare` needs of a model directory: small files only, no weights."""
        self.index = read_json(model, "model_index.json")
        self.lengths = LatentLengths(self.index["video_latent_length"], self.index["audio_latent_length"])
        self.tokenizer = load_tokenizer(f"{model}/tokenizer")

    @classmethod
    def for_preprocessing(cls, model: str) -> Self:
        """Return a pipeline that can :meth:`prepare` requests and nothing else, for the engine's own process."""
        pipeline = cls.__new__(cls)
        nn.Module.__init__(pipeline)
        pipeline.read_directory(model)
        return pipeline

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill all components; see :func:`~port_kit.pipeline.loading.load_component_weights`."""
        return load_component_weights(self, self.components, weights, self.od_config.model)

    @abstractmethod
    def preprocess(
        self, prompt: Any, sampling: Any, lengths: LatentLengths
    ) -> tuple[FusionRequest, Sequence[Tensor], Sequence[Tensor]]:
        """Return the checked request, its images (3, H, W) in [-1, 1] and its audios (16000,), float32.

        Raises:
            InputError: the request cannot be served.
        """

    @abstractmethod
    def branches(self, state: DenoiseState) -> list[dict[str, Any]]:
        """Return the transformer's arguments in each guidance pass of the next step, the full one first."""

    def reapply_conditioning(
        self, video: Tensor, audio: Tensor, conditioning: EncodedConditioning
    ) -> tuple[Tensor, Tensor]:
        """Return the latents, noise or stepped, with what must not change written into them; here, as they are."""
        return video, audio

    def forward(self, req: DiffusionRequestBatch, **_: Any) -> DiffusionOutput | list[DiffusionOutput]:
        """Serve one request, or several at the same time; one that cannot be served is a client's error of its own.

        Returns:
            For each request an ``output`` with ``video`` uint8 (frames, H, W, 3) and ``audio`` float32 (samples,), both
            with a first axis where the request asks for several videos; a list where there are several requests.
        """
        outputs: dict[int, DiffusionOutput] = {}
        prepared_requests: dict[int, PreparedRequest] = {}
        for index, request in enumerate(req.requests):
            try:
                prepared_requests[index] = self.prepare(
                    request.prompt, request.sampling_params, is_dummy_run=request.is_dummy_run()
                )
            except InputError as error:
                outputs[index] = DiffusionOutput.from_exception(to_client_error(error))
        if prepared_requests:
            outputs |= zip(prepared_requests, self.generate(list(prepared_requests.values())), strict=True)
        served = [outputs[index] for index in range(req.num_reqs)]
        return served[0] if req.num_reqs == 1 else served

    def prepare(self, prompt: Any, sampling: Any, *, is_dummy_run: bool = False) -> PreparedRequest:
        """Check a request and read its references; the engine's run at start-up gets the shortest state.

        Raises:
            InputError: the request cannot be served.
        """
        lengths = self.warm_up if is_dummy_run else self.lengths
        request, images, audios = self.preprocess(prompt, sampling, lengths)
        texts = (request.prompt, request.video_negative_prompt, request.audio_negative_prompt)
        positive, video_negative, audio_negative = (
            tokenize(self.tokenizer, text, limit=MAX_TEXT_TOKENS) for text in texts
        )
        return PreparedRequest(request, lengths, (positive, video_negative, audio_negative), images, audios)

    def generate(self, prepared_requests: Sequence[PreparedRequest]) -> list[DiffusionOutput]:
        """Run the model for several requests at the same time; each ends after its own number of steps."""
        running = [self.begin(prepared) for prepared in prepared_requests]
        states = [state for own in running for state in own]
        for _ in self.progress_bar(range(max(prepared.request.steps for prepared in prepared_requests))):
            check_request_cancellation()
            unfinished = [state for state in states if not state.is_done]
            for state, guided in zip(unfinished, self.predict(unfinished), strict=True):
                self.scheduler_step(state, guided)
        return [self.postprocess(own) for own in running]

    def begin(self, prepared: PreparedRequest) -> list[DenoiseState]:
        """Encode what a request gives, once, and draw the noise of each video that it asks for."""
        conditioning = self.encode(prepared)
        return [
            DenoiseState.begin(output, conditioning, *self.reapply_conditioning(*self.noise(output), conditioning))
            for output in prepared.split_outputs()
        ]

    def predict(self, states: Sequence[DenoiseState]) -> list[tuple[Tensor, Tensor]]:
        """Return the guided flows of each state's next step; branches of states that fit together share their calls."""
        branches = [self.branches(state) for state in states]
        flows: dict[int, tuple[Tensor, Tensor]] = {}
        for group in group_requests(states, branches):
            scales = asdict(states[group[0]].prepared.request.scales)
            batched = [collate(one) for one in zip(*(branches[index] for index in group), strict=True)]
            guided: Any = self.predict_noise_with_multi_branch_cfg(True, scales, batched)
            flows |= {index: (guided[0][row : row + 1], guided[1][row : row + 1]) for row, index in enumerate(group)}
        return [flows[index] for index in range(len(states))]

    def scheduler_step(self, state: DenoiseState, guided: tuple[Tensor, Tensor]) -> None:
        """Make the step, put back what must not change, and tell whoever watches."""
        state.advance(guided)
        state.video, state.audio = self.reapply_conditioning(state.video, state.audio, state.conditioning)
        if self.on_step is not None:
            self.on_step(Step(state.index - 1, *guided, state.video, state.audio))

    def postprocess(self, states: Sequence[DenoiseState]) -> DiffusionOutput:
        """Decode one request's videos, one after the other."""
        videos, audios = [], []
        for state in states:
            video, audio = self.decode(state)
            videos.append(to_frames(video))
            audios.append(audio.float())
        if len(states) == 1:
            return DiffusionOutput(output={"video": videos[0], "audio": audios[0]})
        return DiffusionOutput(output={"video": torch.stack(videos), "audio": torch.stack(audios)})

    def decode(self, state: DenoiseState) -> tuple[Tensor, Tensor]:
        """Return video (1, 3, frames, H, W) in [-1, 1] and audio (samples,); references' places are dropped."""
        lengths = state.prepared.lengths
        mel = self.audio_vae.decode(state.audio[:, : lengths.audio].transpose(1, 2))
        return self.vae.decode(state.video[:, :, : lengths.video]), self.vocoder(mel).flatten()

    def encode_prompt(self, token_ids: list[int]) -> Tensor:
        """Return the text encoder's states (1, T, D). vLLM-Omni's prompt cache wraps this method."""
        ids = torch.tensor([token_ids], device=self.device)
        return self.text_encoder(ids, torch.ones_like(ids)).to(self.dtype)

    def _load_diffusion_lora_adapter(self, *, lora_request: Any, lora_path: str, dtype: torch.dtype) -> Any:
        """Read a LoRA with the transformer's original names, or with those of Wan 2.2 for the video tower.

        vLLM-Omni's LoRA manager asks for it.

        Raises:
            OmniClientError: the file is not one for this model.
        """
        part = next(component for component in self.components if component.name == "transformer")
        names = Manifest.from_checkpoint(Path(self.od_config.model) / part.name)
        modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        rules: Any = resolve(part.rules)
        try:
            return read_adapter(
                lora_path,
                self.transformer,
                rules,
                adapter=lora_request.lora_int_id,
                dtype=dtype,
                modules=modules,
                other_names=WAN_NAMES,
            )
        except (InputError, RemapError) as error:
            raise to_client_error(error) from error

    def encode(self, prepared: PreparedRequest) -> EncodedConditioning:
        """Encode references and texts, once a request."""
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

    def noise(self, prepared: PreparedRequest) -> tuple[Tensor, Tensor]:
        """Draw both latents, references' places included, each from its own generator with the same seed."""
        given, (video_shape, audio_shape) = prepared.request, prepared.request.noise_shapes(prepared.lengths)
        video = self._draw(video_shape, given.seed, given.video_noise)
        return video, self._draw(audio_shape, given.seed, given.audio_noise)

    def _draw(self, shape: tuple[int, ...], seed: int, given: Tensor | None) -> Tensor:
        if given is not None:
            return given[None].to(self.device, self.dtype)
        return draw_noise(shape, seed, device=self.device, dtype=self.dtype)


def make_pre_process_func(pipeline: type[FusionPipeline]) -> Callable[[OmniDiffusionConfig], Admission]:
    """Return a port's ``get_pre_process_func``: requests are checked when they arrive in the engine's process.

    A request that cannot be served is refused at once, instead of after those that came before it. What is read for
    that is dropped: workers read it again.
    """

    def get_pre_process_func(od_config: OmniDiffusionConfig) -> Admission:
        reader = pipeline.for_preprocessing(od_config.model)

        def pre_process(request: OmniDiffusionRequest) -> OmniDiffusionRequest:
            try:
                prepared = reader.prepare(request.prompt, request.sampling_params, is_dummy_run=request.is_dummy_run())
                check_cached_outputs(prepared.request.outputs, od_config.cache_backend)
            except InputError as error:
                raise to_client_error(error) from error
            # Step execution asks for the number of steps before the pipeline does.
            request.sampling_params.num_inference_steps = prepared.request.steps
            return request

        return pre_process

    return get_pre_process_func


def get_post_process_func(od_config: OmniDiffusionConfig) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    """Return what turns a worker's output into vLLM-Omni's payload; runs in the engine's process.

    vLLM-Omni asks for it before it starts workers, so this is also where an impossible layout is refused.

    Raises:
        ParallelError: the model cannot be run in the engine's parallel configuration.
    """
    check_options(od_config)
    validate_parallel_config(od_config)

    def post_process(output: dict[str, Tensor]) -> dict[str, Any]:
        return to_omni_payload(output, fps=FPS, sample_rate=AUDIO_SAMPLE_RATE)

    return post_process
