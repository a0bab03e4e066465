"""Pipelines of vLLM-Omni that run an unmodified diffusers pipeline.

The transformer is built on the meta device, adapted by the plan, and filled by the kit's loader. All other components
are loaded by diffusers. Guidance is spread over vLLM-Omni's guidance ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from vllm_omni.diffusion.cancellation import check_request_cancellation
from vllm_omni.diffusion.data import DiffusionOutput
from vllm_omni.diffusion.distributed.utils import get_local_device

from port_kit.autoparallel.cfg import OmniGuidanceGroup, SpreadGuidance, spread_guidance
from port_kit.autoparallel.host import media
from port_kit.autoparallel.host.adapt import Adapted, adapt
from port_kit.autoparallel.host.caching import separate_branches
from port_kit.autoparallel.host.checks import check_host, has_cache, plan_of
from port_kit.autoparallel.host.index import PipelineIndex
from port_kit.autoparallel.host.loading import build_denoiser, load_denoiser, load_pipeline
from port_kit.autoparallel.host.request import call_arguments
from port_kit.autoparallel.ports import hosted_port
from port_kit.errors import InputError
from port_kit.parallel.engine_checks import layout_of
from port_kit.pipeline.finite import check_weights
from port_kit.pipeline.inputs import to_client_error

if TYPE_CHECKING:
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

    PreProcess = Callable[[OmniDiffusionRequest], OmniDiffusionRequest]


class HostPipeline(nn.Module):
    """A pipeline of vLLM-Omni around a pipeline of diffusers.

    Attributes:
        index: index of the pipeline directory.
        adapted: what the plan changed in each denoiser.
        pipeline: the diffusers pipeline; set by :meth:`load_weights`.
        guidance: guidance spread over ranks; None on one rank.
        default_num_inference_steps: steps of a request that gives none; vLLM-Omni clears the cache only if it knows.
        computed: calls of the denoisers without spread guidance; for tests and reports.
    """

    supports_request_batch: ClassVar[bool] = False
    supports_step_execution: ClassVar[bool] = False
    supports_request_cancellation: ClassVar[bool] = True
    #: A dummy request cannot know the inputs of any pipeline.
    dummy_run_num_frames: ClassVar[int] = 0

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        self.od_config = od_config
        self.device = get_local_device()
        self.index = PipelineIndex.read(od_config.model)
        self._dit_modules = self.index.denoisers
        self._encoder_modules: list[str] = []
        self._vae_modules: list[str] = []
        self.weights_sources = ()
        self.guidance: SpreadGuidance | None = None
        self.pipeline: Any = None
        self.computed = 0.0
        steps = self.index.parameters.get("num_inference_steps")
        self.default_num_inference_steps: int | None = None if steps is None else steps.default
        self.adapted: dict[str, Adapted] = {}
        plan, port = plan_of(od_config), hosted_port(od_config.model_class_name)
        for name in self.index.denoisers:
            module = build_denoiser(self.index, name, od_config.dtype)
            self.adapted[name] = adapt(module, plan, od_config, name, port.replace if port else None)
            module.register_forward_pre_hook(self._count)
            self.add_module(name, module)

    @classmethod
    def arrival_check(cls, od_config: OmniDiffusionConfig) -> PreProcess:
        """Return the function that checks a request in the engine's process, before it is queued."""
        parameters = PipelineIndex.read(od_config.model).parameters

        def check(request: OmniDiffusionRequest) -> OmniDiffusionRequest:
            if request.is_dummy_run():
                return request
            try:
                call_arguments(request.prompt, request.sampling_params, parameters, device=None)
            except InputError as error:
                raise to_client_error(error) from error
            return request

        return check

    def _count(self, *_: Any) -> None:
        if self.guidance is None:  # otherwise ranks run different calls; they check in SpreadGuidance.call
            check_request_cancellation()
        self.computed += 1

    @property
    def work(self) -> dict[str, Any]:
        """Work of this rank since its start: complete calls, attention calls by exchange, and guidance's branches."""
        exchanges: dict[str, int] = {}
        for model in (adapted.sharded for adapted in self.adapted.values() if adapted.sharded is not None):
            for kind, count in model.exchanges().items():
                exchanges[kind] = exchanges.get(kind, 0) + count
        return {
            "layout": str(layout_of(self.od_config.parallel_config)),
            "calls": self.computed if self.guidance is None else self.guidance.computed,
            "branches": [] if self.guidance is None else self.guidance.branches,
            "exchanges": exchanges,
        }

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Fill the denoisers, load all other components, and spread guidance.

        Args:
            weights: the loader's stream, empty: the kit and diffusers read the files.
        """
        next(iter(weights), None)  # the loader starts its clock when it is asked for the first tensor
        config = self.od_config
        denoisers = {name: getattr(self, name) for name in self.index.denoisers}
        for name, module in denoisers.items():
            load_denoiser(module, self.index.folder / name, self.adapted[name].rules, config, self.device)
        self.pipeline = load_pipeline(self.index, denoisers, config.dtype, self.device)
        for name, component in self.pipeline.components.items():
            if isinstance(component, nn.Module) and name not in denoisers:
                self.add_module(name, component)
                decodes = "vae" in name or name == "vocoder"
                (self._vae_modules if decodes else self._encoder_modules).append(name)
        check_weights(self, self.index.folder)
        if has_cache(config.cache_backend):
            separate_branches(self.pipeline, denoisers)
        if config.parallel_config.cfg_parallel_size > 1:
            keeps_pace = bool(config.parallel_config.use_hsdp)
            self.guidance = spread_guidance(self.pipeline, denoisers, OmniGuidanceGroup(), keeps_pace=keeps_pace)

    def forward(self, req: DiffusionRequestBatch, **_: Any) -> DiffusionOutput:
        """Serve one request; see :func:`port_kit.autoparallel.host.media.extract` for the output."""
        request = req.requests[0]
        try:
            arguments = call_arguments(
                request.prompt, request.sampling_params, self.index.parameters, torch.device(self.device)
            )
        except InputError as error:
            return DiffusionOutput.from_exception(to_client_error(error))
        if self.guidance is None:
            output = self.pipeline(**arguments)
        else:
            with self.guidance.request():
                output = self.pipeline(**arguments)
        return DiffusionOutput(output={**media.extract(output, self.pipeline), media.WORK: self.work})


class PortKitImagePipeline(HostPipeline):
    """Host of pipelines that return images."""


class PortKitVideoPipeline(HostPipeline):
    """Host of pipelines that return videos, with or without audio."""


class PortKitAudioPipeline(HostPipeline):
    """Host of pipelines that return audio."""

    support_audio_output: ClassVar[bool] = True


def get_pre_process_func(od_config: OmniDiffusionConfig) -> PreProcess:
    """Return the function that checks a request on arrival, for the hosts of ``port-kit run``."""
    return HostPipeline.arrival_check(od_config)


def get_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., dict[str, Any]]:
    """Return the function that makes vLLM-Omni's payload; check the engine's options before workers start.

    Raises:
        ParallelError: ``plan_layout``; the plan does not prove the engine's layout.
    """
    check_host(od_config)
    index = PipelineIndex.read(od_config.model)

    def post_process(output: dict[str, Any], sampling_params: Any = None) -> dict[str, Any]:
        output_type = getattr(sampling_params, "output_type", None)
        return media.payload(output, fps=_fps(sampling_params) or index.fps, output_type=output_type)

    return post_process


def _fps(sampling: Any) -> float | None:
    """Return the frames per second that a request gives, or None."""
    if sampling is None:
        return None
    given = (sampling.fps, sampling.frame_rate, sampling.extra_args.get("frame_rate"))
    return next((rate for rate in given if rate), None)
