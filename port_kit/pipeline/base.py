"""Base class of the pipeline of a port: components, weights and the request loop.

A request goes ``prepare`` -> ``begin`` -> per step (``predict`` -> ``scheduler_step``) -> ``postprocess``. All that
changes between steps is in its :class:`~port_kit.pipeline.request_state.DenoiseState`, so that several requests may run
at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from vllm_omni.diffusion.cancellation import check_request_cancellation
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.models.interface import SupportsComponentDiscovery
from vllm_omni.diffusion.models.progress_bar import ProgressBarMixin
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

from port_kit.errors import InputError, RemapError
from port_kit.manifest import Manifest
from port_kit.parallel.cfg_batching import BatchedCFGMixin
from port_kit.pipeline.batching import collate, group_states
from port_kit.pipeline.caching import configure_cache
from port_kit.pipeline.inputs import to_client_error
from port_kit.pipeline.loading import build_components, load_component_weights, weights_sources
from port_kit.pipeline.media import to_frames
from port_kit.pipeline.request_state import DenoiseState, PreparedRequest, Solver, StepResult
from port_kit.pipeline.step_execution import StepExecution
from port_kit.port import KINDS, Component, resolve
from port_kit.runtime.lora import read_adapter


class PortPipeline(StepExecution, nn.Module, BatchedCFGMixin, ProgressBarMixin, SupportsComponentDiscovery):
    """A pipeline as vLLM-Omni's registry builds it: without weights, which the standard loader then fills in.

    A port implements the abstract methods and ``combine_multi_branch_cfg_noise``.

    Attributes:
        components: weights of the port, in loading order.
        guidance_branches: calls of the transformer per guided step.
        fps: of the output, in frames per second.
        audio_sample_rate: of the output, in Hz; 0 if the model makes no audio.
        max_batch_size: limit of the sum of :meth:`batch_size` over the states of one call.
        lora_names: pairs of (pattern of a checkpoint's module name, name in LoRA files) of further naming schemes.
        on_step: called with the result of every denoising step, None by default.
    """

    components: ClassVar[tuple[Component, ...]]
    guidance_branches: ClassVar[int] = 2
    fps: ClassVar[int]
    audio_sample_rate: ClassVar[int] = 0
    max_batch_size: ClassVar[int] = 2**63
    lora_names: ClassVar[tuple[tuple[str, str], ...]] = ()

    _dit_modules: ClassVar[list[str]]
    _encoder_modules: ClassVar[list[str]]
    _vae_modules: ClassVar[list[str]]
    _resident_modules: ClassVar[list[str]] = []
    supports_request_cancellation: ClassVar[bool] = True
    supports_request_batch: ClassVar[bool] = True
    color_format: ClassVar[str] = "RGB"

    def __init_subclass__(cls, **options: Any) -> None:
        """Derive the lists of modules that vLLM-Omni reads from :attr:`components`."""
        super().__init_subclass__(**options)
        if "components" in vars(cls):
            names = {kind: [part.name for part in cls.components if part.kind == kind] for kind in KINDS}
            cls._dit_modules, cls._encoder_modules, cls._vae_modules = names.values()

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.od_config = od_config
        self.dtype = od_config.dtype
        self.device = get_local_device()
        self.read_directory(od_config.model)
        for name, module in build_components(od_config.model, self.components).items():
            self.add_module(name, module)
        for name in self._dit_modules:
            configure_cache(getattr(self, name), od_config, branches=self.guidance_branches)
        self.weights_sources = weights_sources(od_config.model, self.components)
        self.on_step: Callable[[StepResult], None] | None = None
        self.eval().requires_grad_(False)

    # -- the model directory ---------------------------------------------------------------------------------------

    def read_directory(self, model: str) -> None:
        """Read the small files of a model directory that :meth:`prepare` needs; nothing by default."""

    @classmethod
    def for_preprocessing(cls, model: str) -> Self:
        """Return a pipeline without modules, which can only :meth:`prepare` requests."""
        pipeline = cls.__new__(cls)
        nn.Module.__init__(pipeline)
        pipeline.read_directory(model)
        return pipeline

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill all components; see :func:`~port_kit.pipeline.loading.load_component_weights`."""
        return load_component_weights(self, self.components, weights, self.od_config.model)

    def _load_diffusion_lora_adapter(self, *, lora_request: Any, lora_path: str, dtype: torch.dtype) -> Any:
        """Read a LoRA with the transformer's original names or :attr:`lora_names`, for vLLM-Omni's LoRA manager.

        Raises:
            OmniClientError: the file does not fit this model.
        """
        part = next(component for component in self.components if component.name in self._dit_modules)
        names = Manifest.from_checkpoint(Path(self.od_config.model) / part.name)
        try:
            return read_adapter(
                lora_path,
                getattr(self, part.name),
                resolve(part.rules),  # type: ignore[arg-type]
                adapter=lora_request.lora_int_id,
                dtype=dtype,
                modules=[name.removesuffix(".weight") for name in names if name.endswith(".weight")],
                other_names=self.lora_names,
            )
        except (InputError, RemapError) as error:
            raise to_client_error(error) from error

    # -- parts of a request that depend on the model ----------------------------------------------------------------

    @abstractmethod
    def prepare(self, prompt: Any, sampling: Any, *, is_dummy_run: bool = False) -> PreparedRequest:
        """Check a request and decode its media; a dummy run gets the smallest output that runs every module.

        Raises:
            InputError: the request cannot be served.
        """

    def prepared(self, layout: Any, prompt: Any, sampling: Any, *, is_dummy_run: bool) -> PreparedRequest:
        """Return the request that the engine process prepared, or prepare it if it did not pass through an engine.

        Raises:
            InputError: the request cannot be served.
        """
        if isinstance(layout, PreparedRequest):
            return layout
        return self.prepare(prompt, sampling, is_dummy_run=is_dummy_run)

    @abstractmethod
    def encode(self, prepared: PreparedRequest) -> Any:
        """Encode texts and media, once per request."""

    @abstractmethod
    def initial_latents(self, prepared: PreparedRequest) -> dict[str, Tensor]:
        """Return noise per modality, in the order of the transformer's outputs, each with a batch axis of 1."""

    @abstractmethod
    def build_solver(self, request: Any) -> Solver:
        """Return a solver with its steps set."""

    @abstractmethod
    def branches(self, state: DenoiseState) -> list[dict[str, Any]]:
        """Return the transformer's arguments per guidance branch of the next step, the complete one first."""

    @abstractmethod
    def decode(self, state: DenoiseState) -> dict[str, Tensor]:
        """Return the output: ``video`` (1, 3, frames, H, W) in [-1, 1], and ``audio`` (samples,) if there is any."""

    def reapply_conditioning(self, latents: dict[str, Tensor], conditioning: Any) -> dict[str, Tensor]:
        """Return latents with the parts that no step may change restored; by default unchanged."""
        return latents

    def batch_size(self, state: DenoiseState) -> int:
        """Return the size of a state, in the unit of :attr:`max_batch_size`."""
        return sum(latent.numel() for latent in state.latents.values())

    # -- the request loop ------------------------------------------------------------------------------------------

    def forward(self, req: DiffusionRequestBatch, **_: Any) -> DiffusionOutput | list[DiffusionOutput]:
        """Serve one or several requests; a request that cannot be served gives an error of its own.

        Returns:
            Per request an ``output`` with ``video`` uint8 (frames, H, W, 3) and ``audio`` float32 (samples,), each with
            a first axis if the request asks for several outputs. A list if there are several requests.
        """
        outputs: dict[int, DiffusionOutput] = {}
        admitted: dict[int, PreparedRequest] = {}
        for index, request in enumerate(req.requests):
            try:
                admitted[index] = self.prepared(
                    request.prepared_layout,
                    request.prompt,
                    request.sampling_params,
                    is_dummy_run=request.is_dummy_run(),
                )
            except InputError as error:
                outputs[index] = DiffusionOutput.from_exception(to_client_error(error))
        if admitted:
            outputs |= zip(admitted, self.generate(list(admitted.values())), strict=True)
        served = [outputs[index] for index in range(req.num_reqs)]
        return served[0] if req.num_reqs == 1 else served

    def generate(self, requests: Sequence[PreparedRequest]) -> list[DiffusionOutput]:
        """Run several requests at the same time, each for its own number of steps."""
        running = [self.begin(prepared) for prepared in requests]
        states = [state for own in running for state in own]
        for _ in self.progress_bar(range(max(prepared.request.steps for prepared in requests))):
            check_request_cancellation()
            unfinished = [state for state in states if not state.is_done]
            for state, guided in zip(unfinished, self.predict(unfinished), strict=True):
                self.scheduler_step(state, guided)
        return [self.postprocess(own) for own in running]

    def begin(self, prepared: PreparedRequest) -> list[DenoiseState]:
        """Encode a request once, and return the initial state of each of its outputs."""
        conditioning = self.encode(prepared)
        states = []
        for output in prepared.split_outputs():
            latents = self.reapply_conditioning(self.initial_latents(output), conditioning)
            states.append(DenoiseState.begin(output, conditioning, latents, partial(self.build_solver, output.request)))
        return states

    def predict(self, states: Sequence[DenoiseState]) -> list[tuple[Tensor, ...]]:
        """Return the guided predictions of each state's next step; states that fit together share their calls."""
        branches = [self.branches(state) for state in states]
        predictions: dict[int, tuple[Tensor, ...]] = {}
        keys = [state.prepared.request.scales for state in states]
        for group in group_states(keys, branches, [self.batch_size(state) for state in states], self.max_batch_size):
            batched = [collate(branch) for branch in zip(*(branches[index] for index in group), strict=True)]
            guided: Any = self.predict_noise_with_multi_branch_cfg(True, asdict(keys[group[0]]), batched)
            rows = guided if isinstance(guided, tuple) else (guided,)
            for row, index in enumerate(group):
                predictions[index] = tuple(prediction[row : row + 1] for prediction in rows)
        return [predictions[index] for index in range(len(states))]

    def scheduler_step(self, state: DenoiseState, guided: tuple[Tensor, ...]) -> None:
        """Advance a state by one step and restore its conditioning."""
        state.advance(guided)
        state.latents = self.reapply_conditioning(state.latents, state.conditioning)
        if self.on_step is not None:
            self.on_step(StepResult(state.index - 1, dict(zip(state.latents, guided, strict=True)), state.latents))

    def postprocess(self, states: Sequence[DenoiseState]) -> DiffusionOutput:
        """Decode the outputs of one request, one after the other."""
        decoded = [self._finalize(self.decode(state)) for state in states]
        if len(decoded) == 1:
            return DiffusionOutput(output=decoded[0])
        return DiffusionOutput(output={name: torch.stack([one[name] for one in decoded]) for name in decoded[0]})

    def _finalize(self, decoded: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: to_frames(value) if name == "video" else value.float() for name, value in decoded.items()}
