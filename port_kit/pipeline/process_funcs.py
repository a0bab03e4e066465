"""Module that vLLM-Omni imports for every port: pipeline classes by name, pre-process and post-process functions.

vLLM-Omni looks the factories of both functions up in the module of the pipeline. All ports are registered with this
module, which resolves a class on first use; a port's own modules need not know of the functions. Both run in the
engine's process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.errors import InputError, PortNotFoundError, RemapError
from port_kit.parallel.engine_checks import check_engine
from port_kit.parallel.meta_init import meta_init
from port_kit.pipeline.adapter import AdapterAdmission
from port_kit.pipeline.inputs import check_cached_outputs, to_client_error
from port_kit.pipeline.loading import build_components
from port_kit.pipeline.media import to_omni_payload
from port_kit.pipeline.request_state import without_media
from port_kit.port import DENOISERS, Component, resolve
from port_kit.registry import port_of_class
from port_kit.runtime.engine_options import check_options

if TYPE_CHECKING:
    from torch import Tensor, nn
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.request import OmniDiffusionRequest

    PreProcess = Callable[[OmniDiffusionRequest], OmniDiffusionRequest]


def __getattr__(class_name: str) -> Any:
    """Return the pipeline class of the port with this ``class_name``."""
    try:
        port = port_of_class(class_name)
    except PortNotFoundError as error:
        raise AttributeError(str(error)) from error
    return resolve(port.pipeline)


def get_pre_process_func(od_config: OmniDiffusionConfig) -> PreProcess | None:
    """Return the function that prepares a request on arrival, before it is queued.

    The prepared request, with its decoded media, travels to the workers in place of the encoded media. None for a
    pipeline that prepares its requests itself, and is not the kit's.
    """
    port = port_of_class(od_config.model_class_name)
    pipeline: Any = resolve(port.pipeline)
    if hasattr(pipeline, "arrival_check"):  # a pipeline of diffusers, which prepares its requests itself
        check: PreProcess = pipeline.arrival_check(od_config)
        return check
    adapters = AdapterAdmission(_adapter_reader(pipeline, od_config))
    if not hasattr(pipeline, "for_preprocessing"):
        return None if not hasattr(pipeline, "read_adapter") else partial(_admit_adapter, adapters)
    reader = pipeline.for_preprocessing(od_config.model)

    def pre_process(request: OmniDiffusionRequest) -> OmniDiffusionRequest:
        try:
            prepared = reader.admit(request.prompt, request.sampling_params, is_dummy_run=request.is_dummy_run())
            check_cached_outputs(prepared.request.outputs, od_config.cache_backend)
        except InputError as error:
            raise to_client_error(error) from error
        _admit_adapter(adapters, request)
        request.prepared_layout = prepared
        request.prompt = without_media(request.prompt)
        # Step execution needs the number of steps before the pipeline is called.
        request.sampling_params.num_inference_steps = prepared.request.steps
        return request

    return pre_process


def _admit_adapter(adapters: AdapterAdmission, request: OmniDiffusionRequest) -> OmniDiffusionRequest:
    try:
        adapters.admit(request.sampling_params)
    except (InputError, RemapError) as error:
        raise to_client_error(error) from error
    return request


def _adapter_reader(pipeline: Any, od_config: OmniDiffusionConfig) -> Callable[[Path], object]:
    """Return a function that reads a LoRA for the model, whose parts are built without weights on first use."""
    modules: list[nn.Module] = []

    def read(path: Path) -> object:
        if not modules:
            with meta_init(od_config.dtype):
                modules.extend(_build(pipeline.lora_components(), od_config))
        return pipeline.read_adapter(path, modules, od_config.model, adapter=1, dtype=od_config.dtype)

    return read


def get_post_process_func(od_config: OmniDiffusionConfig) -> Callable[[Any], Any]:
    """Return the function that makes vLLM-Omni's payload of a worker's output.

    vLLM-Omni calls this before it starts workers. The engine's options and parallel layout are checked here. A port's
    ``post_process`` replaces all of it.

    Raises:
        ParallelError: the model cannot run in the engine's parallel layout.
        PortNotFoundError: no port serves the model's class.
    """
    port = port_of_class(od_config.model_class_name)
    if port.post_process:
        factory: Any = resolve(port.post_process)
        own: Callable[[Any], Any] = factory(od_config)
        return own
    check_options(od_config)
    pipeline: Any = resolve(port.pipeline)
    denoisers = [component for component in port.components if component.kind in DENOISERS]
    check_engine(od_config, partial(_build, denoisers, od_config), branches=port.guidance_branches)

    def post_process(output: dict[str, Tensor]) -> dict[str, Any]:
        return to_omni_payload(output, fps=pipeline.fps, sample_rate=pipeline.audio_sample_rate)

    return post_process


def _build(components: Sequence[Component], od_config: OmniDiffusionConfig) -> list[nn.Module]:
    return list(build_components(str(od_config.model), components).values())
