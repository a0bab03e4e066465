"""From a model directory to filled modules, through vLLM-Omni's standard loader and the port's rule sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config.load import LoadConfig
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

from port_kit.parallel.hsdp import shard_before_loading
from port_kit.pipeline.model_index import incomplete, port_of_model, read_json
from port_kit.port import DENOISERS, Component, Pretrained, resolve
from port_kit.remap import load_components, load_local
from port_kit.upstream.checks import require

require("weights_stream")


def build_components(model: str | Path, components: Sequence[Component]) -> dict[str, nn.Module]:
    """Build every component empty, from its ``config.json``, on the current default device and dtype."""
    built = {}
    for component in components:
        build: Any = resolve(component.build)
        built[component.name] = build(read_json(model, f"{component.name}/config.json"))
    return built


def load_pretrained(part: Pretrained, model: str | Path, dtype: torch.dtype) -> nn.Module:
    """Load a part with its own library; every parameter must be filled and every tensor used.

    Raises:
        PortKitError: ``model_incomplete``, with the names.
    """
    source: Any = resolve(part.source)
    folder = f"{model}/{part.name}"
    module, info = source.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise incomplete(f"{folder} does not fill {source.__name__}: {wrong}")
    filled: nn.Module = module.eval()
    return filled


def load_pipeline(model: str | Path) -> Any:
    """Build the pipeline of a model directory and load its weights, in the default dtype.

    It needs process groups: :func:`port_kit.runtime.single_process.single_rank`.
    """
    pipeline_class: Any = resolve(port_of_model(model).pipeline)
    od_config = OmniDiffusionConfig(model=str(model), dtype=torch.get_default_dtype())
    pipeline = pipeline_class(od_config=od_config)
    DiffusersPipelineLoader(LoadConfig(), od_config).load_weights(pipeline)
    return pipeline


def weights_sources(
    model: str | Path, components: Sequence[Component]
) -> list[DiffusersPipelineLoader.ComponentSource]:
    """Name each component's folder to the standard loader; safetensors only, a pickle is never opened here."""
    return [
        DiffusersPipelineLoader.ComponentSource(
            model_or_path=str(model),
            subfolder=component.name,
            revision=None,
            prefix=f"{component.name}.",
            fall_back_to_pt=False,
            allow_patterns_overrides=["*.safetensors"],
        )
        for component in components
    ]


def load_component_weights(
    owner: nn.Module, components: Sequence[Component], weights: Iterable[tuple[str, torch.Tensor]], model: str | Path
) -> set[str]:
    """Fill the components; every tensor is accounted for by its component's rule set.

    Each rank reads the files itself, and only its own part of them (:func:`port_kit.remap.local.load_local`). Quantized
    models keep the loader's stream, which vLLM-Omni may change on its way.

    Args:
        owner: the pipeline; a component is its attribute of the component's name. Its diffusion transformers and their
            partners are sharded first if HSDP is on.
        components: they must be in the model directory.
        weights: ``(component.original_name, tensor)``, the loader's stream.
        model: the model directory.

    Returns:
        Names of the filled parameters and buffers, with the component's name.

    Raises:
        RemapError: a missing, unexpected, misshapen or repeated tensor; names it, its file and the closest name.
    """
    for component in components:
        if component.kind in DENOISERS:
            is_root = component.kind == "transformer"
            shard_before_loading(getattr(owner, component.name), owner.od_config, get_local_device(), is_root=is_root)
    parts: dict[str, Any] = {
        component.name: (getattr(owner, component.name), resolve(component.rules)) for component in components
    }
    if owner.od_config.quantization_config is not None:
        return load_components(parts, weights, model=model)
    next(iter(weights), None)  # the loader looks at the files, and starts its clock, when it is asked for the first
    loaded: set[str] = set()
    for name, (module, rules) in parts.items():
        loaded |= load_local(module, Path(model) / name, rules, prefix=f"{name}.").loaded
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of the tensors that were copied through buffers
    return loaded
