"""Pre-process and post-process functions of every port that has a :class:`~port_kit.pipeline.base.PortPipeline`.

vLLM-Omni looks both factories up in the module of the pipeline, which imports them from here. Both run in the engine's
process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from port_kit.errors import InputError, PortNotFoundError
from port_kit.parallel.engine_checks import check_engine
from port_kit.pipeline.inputs import check_cached_outputs, to_client_error
from port_kit.pipeline.loading import read_json
from port_kit.pipeline.media import to_omni_payload
from port_kit.pipeline.request_state import without_media
from port_kit.port import Port, resolve
from port_kit.registry import list_ports
from port_kit.runtime.engine_options import check_options

if TYPE_CHECKING:
    from torch import Tensor, nn
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.request import OmniDiffusionRequest

    PreProcess = Callable[[OmniDiffusionRequest], OmniDiffusionRequest]


def get_pre_process_func(od_config: OmniDiffusionConfig) -> PreProcess:
    """Return the function that prepares a request on arrival, before it is queued.

    The prepared request, with its decoded media, travels to the workers in place of the encoded media.
    """
    pipeline: Any = resolve(port_of_class(od_config.model_class_name).pipeline)
    reader = pipeline.for_preprocessing(od_config.model)

    def pre_process(request: OmniDiffusionRequest) -> OmniDiffusionRequest:
        try:
            prepared = reader.prepare(request.prompt, request.sampling_params, is_dummy_run=request.is_dummy_run())
            check_cached_outputs(prepared.request.outputs, od_config.cache_backend)
        except InputError as error:
            raise to_client_error(error) from error
        request.prepared_layout = prepared
        request.prompt = without_media(request.prompt)
        # Step execution needs the number of steps before the pipeline is called.
        request.sampling_params.num_inference_steps = prepared.request.steps
        return request

    return pre_process


def get_post_process_func(od_config: OmniDiffusionConfig) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    """Return the function that makes vLLM-Omni's payload of a worker's output.

    vLLM-Omni calls this before it starts workers. The engine's options and parallel layout are checked here.

    Raises:
        ParallelError: the model cannot run in the engine's parallel layout.
        PortNotFoundError: no port serves the model's class.
    """
    check_options(od_config)
    port = port_of_class(od_config.model_class_name)
    pipeline: Any = resolve(port.pipeline)
    check_engine(od_config, lambda: _build_transformer(port, od_config), branches=pipeline.guidance_branches)

    def post_process(output: dict[str, Tensor]) -> dict[str, Any]:
        return to_omni_payload(output, fps=pipeline.fps, sample_rate=pipeline.audio_sample_rate)

    return post_process


def port_of_class(class_name: str | None) -> Port:
    """Return the port of a pipeline's class.

    Raises:
        PortNotFoundError: no port serves the class.
    """
    ports = {port.class_name: port for port in list_ports().values()}
    if class_name not in ports:
        known = sorted(ports)
        raise PortNotFoundError(f"no port serves {class_name}", hint=f"known are {', '.join(known)}", known=known)
    return ports[class_name]


def _build_transformer(port: Port, od_config: OmniDiffusionConfig) -> nn.Module:
    component = next(component for component in port.components if component.kind == "transformer")
    build: Any = resolve(component.build)
    module: nn.Module = build(read_json(str(od_config.model), f"{component.name}/config.json"))
    return module
