"""Components of a hosted pipeline: denoisers with a plan applied, everything else as diffusers loads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from port_kit.autoparallel.host.index import PipelineIndex
from port_kit.parallel.hsdp import shard_before_loading
from port_kit.parallel.memory import materialize
from port_kit.pipeline.precision import default_dtype
from port_kit.remap import RuleSet, load_local
from port_kit.upstream.checks import require


def build_component(config: Mapping[str, Any]) -> nn.Module:
    """Build the model of a ``config.json`` of diffusers, on the current default device and dtype."""
    import diffusers

    module: nn.Module = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    return module


def build_denoiser(index: PipelineIndex, name: str, dtype: torch.dtype) -> nn.Module:
    """Build a denoiser from its configuration, with parameters on the meta device.

    Buffers and tables that its constructor computes are real. Parameters that diffusers keeps in float32 have it.

    Args:
        index: index of the pipeline.
        name: component.
        dtype: dtype of the parameters.
    """
    from accelerate import init_empty_weights

    model_class = index.component_class(name)
    config = model_class.load_config(str(index.folder / name))
    with default_dtype(dtype), init_empty_weights(include_buffers=False):
        module: nn.Module = model_class.from_config(config)
    _keep_float32(module, dtype)
    return module.eval().requires_grad_(False)


def load_denoiser(module: nn.Module, folder: Path, rules: RuleSet, od_config: Any, device: torch.device) -> None:
    """Fill a denoiser from its folder; under HSDP its blocks are sharded first.

    Args:
        module: the denoiser; its parameters are on the meta device.
        folder: its checkpoint.
        rules: rules from the checkpoint to the module.
        od_config: the engine's configuration.
        device: the rank's device.

    Raises:
        RemapError: a missing, unexpected or misshapen tensor.
    """
    shard_before_loading(module, od_config, device)
    materialize(module, device)
    buffers_to(module, device)
    load_local(module, folder, rules)


def buffers_to(module: nn.Module, device: torch.device) -> None:
    """Move the buffers of a module to a device; its parameters stay."""
    for owner in module.modules():
        for leaf, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[leaf] = buffer.to(device)


def load_pipeline(index: PipelineIndex, denoisers: dict[str, nn.Module], dtype: torch.dtype, device: Any) -> Any:
    """Return the pipeline of diffusers with these denoisers; all other components are loaded by diffusers.

    Progress is not shown: each rank would draw bars of its own.
    """
    with _without_progress():
        pipeline = index.pipeline_class.from_pretrained(str(index.folder), dtype=dtype, **denoisers)
    pipeline.set_progress_bar_config(disable=True)
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name not in denoisers:
            component.to(device).eval().requires_grad_(False)
    return pipeline


@contextmanager
def _without_progress() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _keep_float32(module: nn.Module, dtype: torch.dtype) -> None:
    require("kept_in_float32")
    names = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if dtype not in (torch.float16, torch.bfloat16) or not names:
        return
    for path, owner in module.named_modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and names & {*path.split("."), leaf}:
                owner._parameters[leaf] = nn.Parameter(parameter.float(), requires_grad=False)
