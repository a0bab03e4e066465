"""Which parallel layouts a port of the family can have: asked before an engine starts its workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from port_kit.errors import PortNotFoundError
from port_kit.models.wan.transformer.model import build_transformer
from port_kit.parallel.engine_checks import check_engine
from port_kit.pipeline.loading import read_json
from port_kit.port import list_ports, resolve

if TYPE_CHECKING:
    from torch import nn
    from vllm_omni.diffusion.data import OmniDiffusionConfig


def validate_parallel_config(od_config: OmniDiffusionConfig) -> None:
    """Refuse an engine's layout, or its cache, that the model in its directory cannot have; nothing is loaded.

    Raises:
        ParallelError: says what is possible, and what a rank would then hold.
        PortNotFoundError: no port serves the model's class.
    """
    ports = {port.class_name: port for port in list_ports().values()}
    if od_config.model_class_name not in ports:
        known = sorted(ports)
        raise PortNotFoundError(
            f"no port serves {od_config.model_class_name}", hint=f"known are {', '.join(known)}", known=known
        )
    pipeline: Any = resolve(ports[od_config.model_class_name].pipeline)
    check_engine(od_config, lambda: _outline(str(od_config.model)), branches=pipeline.guidance_branches)


def _outline(model: str) -> nn.Module:
    return build_transformer(read_json(model, "transformer/config.json"))
