"""From a model directory to filled modules, through vLLM-Omni's standard loader and the port's rule sets."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

from port_kit.errors import PortKitError
from port_kit.parallel.hsdp import shard_before_loading
from port_kit.port import Component, resolve
from port_kit.remap import RuleSet, load_components
from port_kit.remap.ops import OPS
from port_kit.remap.readahead import read_ahead


def read_json(model: str | Path, name: str) -> Mapping[str, Any]:
    """Return a JSON file of the model directory.

    Raises:
        PortKitError: ``model_incomplete``, if it is not there or no JSON object.
    """
    path = Path(model) / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _incomplete(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise _incomplete(f"{path} holds {type(content).__name__}, not an object")
    return content


def build_components(model: str | Path, components: Sequence[Component]) -> dict[str, nn.Module]:
    """Build every component empty, from its ``config.json``, on the current default device and dtype."""
    built = {}
    for component in components:
        build: Any = resolve(component.build)
        built[component.name] = build(read_json(model, f"{component.name}/config.json"))
    return built


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
    """Fill the components from the loader's stream; every tensor is accounted for by its component's rule set.

    On a GPU the kit reads the stream's files itself, ahead (:func:`port_kit.remap.readahead.read_ahead`): mapped files
    would be read a page at a time. Quantized models keep the stream, which vLLM-Omni may change on its way.

    Args:
        owner: the pipeline; a component is its attribute of the component's name. Its diffusion transformers are
            sharded first where HSDP is on.
        components: all of them must be in the stream.
        weights: ``(component.original_name, tensor)``.
        model: the directory that the stream comes from: its headers are checked first, and errors name its files.

    Returns:
        Names of the filled parameters and buffers, with the component's name in front.

    Raises:
        RemapError: a missing, unexpected, misshapen or repeated tensor; names it, its file and the nearest name.
    """
    for name in owner._dit_modules:
        shard_before_loading(getattr(owner, name), owner.od_config, get_local_device())
    parts: dict[str, Any] = {
        component.name: (getattr(owner, component.name), resolve(component.rules)) for component in components
    }
    on_gpu = any(parameter.is_cuda for module, _ in parts.values() for parameter in module.parameters())
    if not on_gpu or owner.od_config.quantization_config is not None:
        return load_components(parts, weights, model=model)
    next(iter(weights), None)  # the loader looks at the files, and starts its clock, when it is asked for the first
    with closing(read_components(parts, model)) as stream:
        loaded = load_components(parts, stream, model=model)
    torch.cuda.empty_cache()  # of the tensors on their way, which had memory of their own
    return loaded


def read_components(
    parts: Mapping[str, tuple[nn.Module, RuleSet]], model: str | Path, **ring: int
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """Stream components' tensors from a model directory, each to the device that its component is on.

    What a rule set computes (a weight norm's fold, say) is computed on the CPU wherever the component is: a GPU would
    round it otherwise.

    Args:
        parts: ``{component: (module, rules)}``.
        model: the model directory.
        ring: ``block``, ``blocks`` and ``threads`` of :func:`~port_kit.remap.readahead.read_ahead`.
    """
    for name, (module, rules) in parts.items():
        device = next(module.parameters()).device
        if any(op.name not in OPS for rule in rules for op in rule.op):
            device = torch.device("cpu")
        with closing(read_ahead(Path(model) / name, device=device, prefix=f"{name}.", **ring)) as stream:
            yield from stream


def _incomplete(problem: str) -> PortKitError:
    return PortKitError(
        problem, code="model_incomplete", hint="assemble the directory again: port-kit download PORT --output-dir DIR"
    )
