"""Base class of the pipeline of a port with the kit's request loop.

A request goes ``prepare`` -> ``begin`` -> per step (``predict`` -> ``scheduler_step``) -> ``postprocess``. All that
changes between steps is in its :class:`~port_kit.pipeline.request_state.DenoiseState`, so that several requests may run
at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, distributed, nn
from vllm_omni.diffusion.cancellation import check_request_cancellation
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.models.progress_bar import ProgressBarMixin
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

from port_kit.errors import InputError, PortKitError
from port_kit.parallel.cfg_batching import BatchedCFGMixin
from port_kit.pipeline import guidance_gate
from port_kit.pipeline.admission import admit, magnitudes
from port_kit.pipeline.batching import collate, group_states
from port_kit.pipeline.component_pipeline import ComponentPipeline
from port_kit.pipeline.finite import check_output
from port_kit.pipeline.guidance_gate import GuidanceEffect
from port_kit.pipeline.inputs import to_client_error
from port_kit.pipeline.media import to_frames
from port_kit.pipeline.model_index import port_of_model
from port_kit.pipeline.request_state import DenoiseState, PreparedRequest, Solver, StepResult
from port_kit.pipeline.step_execution import StepExecution
from port_kit.port import Port
from port_kit.runtime.progress import Reporter
from port_kit.upstream.checks import require

require("requests")


class PortPipeline(StepExecution, ComponentPipeline, BatchedCFGMixin, ProgressBarMixin):
    """A pipeline with the kit's request loop.

    A port implements the abstract methods, and ``combine_multi_branch_cfg_noise`` unless guidance has two branches and
    one scale.

    Attributes:
        max_batch_size: limit of the sum of :meth:`batch_size` over the states of one call.
        prompt_fields: names of the prompt that the pipeline reads beside those of all ports.
        tensor_options: names of options that may be tensors.
        not_read: reasons why the pipeline does not read options of other models.
        port: the port of the model directory.
        on_step: called with the result of every denoising step, None by default.
        reporter: tells the server the steps of requests.
    """

    max_batch_size: ClassVar[int] = 2**63
    batches_branches: ClassVar[bool] = False
    supports_request_batch: ClassVar[bool] = True
    prompt_fields: ClassVar[tuple[str, ...]] = ()
    tensor_options: ClassVar[Collection[str]] = ()
    not_read: ClassVar[Mapping[str, str]] = {}
    port: Port

    @property
    def fixed_frames(self) -> int | None:
        """Number of frames of every video of the model; None if requests choose it. Servers check requests with it."""
        return None

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__(od_config=od_config, prefix=prefix)
        self.port = port_of_model(od_config.model)
        self.on_step: Callable[[StepResult], None] | None = None
        rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        self.reporter = Reporter.of_rank(rank, ranks // od_config.parallel_config.data_parallel_size)

    @classmethod
    def for_preprocessing(cls, model: str) -> Self:
        """Return a pipeline without modules, which can only :meth:`prepare` requests."""
        pipeline = cls.__new__(cls)
        nn.Module.__init__(pipeline)
        pipeline.port = port_of_model(model)
        pipeline.read_directory(model)
        return pipeline

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
        prepared = layout
        if not isinstance(layout, PreparedRequest):
            prepared = self.admit(prompt, sampling, is_dummy_run=is_dummy_run)
        guidance_gate.check_engine(prepared.request, self.od_config)
        return prepared

    def admit(self, prompt: Any, sampling: Any, *, is_dummy_run: bool = False) -> PreparedRequest:
        """Check the names that a request sets, and prepare it.

        Raises:
            InputError: the request cannot be served.
        """
        if is_dummy_run:
            return self.prepare(prompt, sampling, is_dummy_run=True)
        admit(
            prompt,
            sampling,
            self.port,
            fps=self.fps,
            prompt_fields=self.prompt_fields,
            tensors=self.tensor_options,
            reasons=self.not_read,
        )
        return replace(self.prepare(prompt, sampling), magnitudes=magnitudes(sampling, self.port))

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
        """Return the output: ``video`` (1, 3, frames, H, W) or ``image`` (1, 3, H, W), in [-1, 1], and ``audio``.

        The model decides which of them there are. ``audio`` is (samples,) or (channels, samples), in [-1, 1].
        """

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
            Per request an ``output`` with ``video`` uint8 (frames, H, W, 3), ``image`` uint8 (H, W, 3) and ``audio``
            float32 (samples,) or (channels, samples), as the model has them, each with a first axis if the request asks
            for several outputs. ``audio`` alone is always (outputs, channels, samples). A list if there are several
            requests.
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
            names = [req.requests[index].request_id for index in admitted]
            outputs |= zip(admitted, self.generate(list(admitted.values()), names), strict=True)
        served = [outputs[index] for index in range(req.num_reqs)]
        return served[0] if req.num_reqs == 1 else served

    def generate(self, requests: Sequence[PreparedRequest], names: Sequence[str]) -> list[DiffusionOutput]:
        """Run several requests at the same time, each for its own number of steps.

        Args:
            requests: the requests.
            names: their ids in the engine.
        """
        self.reporter.report(dict.fromkeys(names, (0, 0)))
        running = [self.begin(prepared) for prepared in requests]
        states = [state for own in running for state in own]
        self._report(names, running)
        for _ in self.progress_bar(range(max(prepared.request.steps for prepared in requests))):
            check_request_cancellation()
            unfinished = [state for state in states if not state.is_done]
            for state, guided in zip(unfinished, self.predict(unfinished), strict=True):
                self.scheduler_step(state, guided)
            self._report(names, running)
        return [self.postprocess(own) for own in running]

    def _report(self, names: Sequence[str], running: Sequence[Sequence[DenoiseState]]) -> None:
        self.reporter.report({name: own[0].steps_done for name, own in zip(names, running, strict=True)})

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
        keys = [(state.prepared.request.scales, guidance_gate.is_reused(state)) for state in states]
        for group in group_states(keys, branches, [self.batch_size(state) for state in states], self.max_batch_size):
            batched = [collate(branch) for branch in zip(*(branches[index] for index in group), strict=True)]
            scales, reused = keys[group[0]]
            guided, first = self.predict_guided(asdict(scales), batched, first_only=reused)
            if reused:
                for contexts in self.cache_contexts:
                    contexts.end_step()
            for row, index in enumerate(group):
                own = [tuple(flow[row : row + 1] for flow in flows) for flows in (guided, first)]
                predictions[index] = self._guide(states[index], *own)
        return [predictions[index] for index in range(len(states))]

    def _guide(self, state: DenoiseState, guided: tuple[Tensor, ...], first: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the guided prediction of a state; keep or reuse the effect of guidance if its gate says so."""
        if guidance_gate.is_kept(state):
            state.guidance = GuidanceEffect.between(guided, first)
        if guidance_gate.is_reused(state):
            assert state.guidance is not None, "the step before the gate keeps it"
            return state.guidance.add_to(first)
        return guided

    def scheduler_step(self, state: DenoiseState, guided: tuple[Tensor, ...]) -> None:
        """Advance a state by one step and restore its conditioning."""
        state.advance(guided)
        state.latents = self.reapply_conditioning(state.latents, state.conditioning)
        if self.on_step is not None:
            self.on_step(StepResult(state.index - 1, dict(zip(state.latents, guided, strict=True)), state.latents))

    def postprocess(self, states: Sequence[DenoiseState]) -> DiffusionOutput:
        """Decode the outputs of one request, one after the other; values that are not finite give an error."""
        try:
            decoded = [self._decode(state) for state in states]
        except InputError as error:
            return DiffusionOutput.from_exception(to_client_error(error))
        except PortKitError as error:
            return DiffusionOutput.from_exception(error)
        if decoded[0].keys() == {"audio"}:
            return DiffusionOutput(output={"audio": torch.stack([torch.atleast_2d(one["audio"]) for one in decoded])})
        if len(decoded) == 1:
            return DiffusionOutput(output=decoded[0])
        return DiffusionOutput(output={name: torch.stack([one[name] for one in decoded]) for name in decoded[0]})

    def _decode(self, state: DenoiseState) -> dict[str, Tensor]:
        decoded = self.decode(state)
        # Decoders may turn values beyond all bounds into plausible ones.
        for name, value in (*state.latents.items(), *decoded.items()):
            check_output(name, value, state.prepared.magnitudes)
        return {name: _FINALIZE.get(name, Tensor.float)(value) for name, value in decoded.items()}


def _to_image(image: Tensor) -> Tensor:
    return to_frames(image[:, :, None])[0]


_FINALIZE: Mapping[str, Callable[[Tensor], Tensor]] = {"video": to_frames, "image": _to_image}
