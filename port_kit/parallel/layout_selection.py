"""Selection of the layouts that ``verify parallel`` runs on a device."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from port_kit.errors import ParallelError
from port_kit.parallel.layout import Layout
from port_kit.parallel.meta_init import meta_init
from port_kit.parallel.preflight import ModelShape, describe_model, preflight
from port_kit.port import DENOISERS, Port, resolve

if TYPE_CHECKING:
    from port_kit.parallel.verify import ParallelTestCase

#: Largest absolute difference from one rank's output on a GPU, float32. Kernels depend on the shapes of the shards.
GPU_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Device:
    """Device that ranks run on.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        ranks: available devices; None on a CPU, which bounds no number of ranks.
        tolerance: largest absolute difference from one rank's output.
        config: fields of ``OmniDiffusionConfig`` that the comparison needs on the device.
    """

    kind: str
    ranks: int | None
    tolerance: float
    config: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self, test_case: ParallelTestCase) -> ParallelTestCase:
        """Return the test case with this device's configuration."""
        return replace(test_case, config={**test_case.config, **self.config})


def find_device(wanted: str, tolerance: float) -> Device:
    """Return the device that this environment's vLLM runs on, without initializing it.

    Args:
        wanted: ``auto``, ``cpu`` or ``cuda``.
        tolerance: tolerance on a CPU.

    Raises:
        ParallelError: vLLM is built for another device.
    """
    from vllm_omni.platforms import current_omni_platform

    kind = "cuda" if current_omni_platform.is_cuda() else "cpu"
    if wanted not in ("auto", kind):
        raise ParallelError(
            f"Device {wanted} is not available: the installed vLLM runs on {kind}.",
            code="parallel_device",
            hint=f"pass --device {kind}, or install a vLLM built for {wanted}",
            device=wanted,
        )
    if kind == "cpu":
        return Device(kind, None, tolerance)
    # float32 shows faults that bfloat16 rounding hides; SDPA is the attention backend that supports it
    config = {"diffusion_attention_backend": "TORCH_SDPA"}
    return Device(kind, torch.cuda.device_count(), max(tolerance, GPU_TOLERANCE), config)


def read_model_shape(port: Port, model: Path) -> ModelShape | None:
    """Return a port's model shape; None, with a warning, if its heads and widths are unknown.

    They are unknown if the port has no transformer of its own, or the model directory no configuration of it. The plan
    of a port with one takes the place of its shape.
    """
    if port.plan:
        return None
    denoisers = [component for component in port.components if component.kind in DENOISERS]
    if not denoisers:
        _warn(f"port {port.name} has no component of kind transformer")
        return None
    configs = [model / component.name / "config.json" for component in denoisers]
    if missing := [config for config in configs if not config.is_file()]:
        _warn(f"{missing[0]} does not exist")
        return None
    builders: list[Any] = [resolve(component.build) for component in denoisers]
    with meta_init(torch.float32):
        modules = [
            build(json.loads(config.read_text(encoding="utf-8")))
            for build, config in zip(builders, configs, strict=True)
        ]
        return describe_model(*modules, branches=port.guidance_branches)


def _warn(reason: str) -> None:
    # not through logging: imports of vLLM set the level of the root logger to ERROR
    warnings.warn(f"layouts are not checked before they run: {reason}", stacklevel=3)


def choose_layouts(
    wanted: Iterable[str], defaults: Iterable[str], shape: ModelShape | None, device: Device
) -> tuple[list[str], dict[str, str]]:
    """Return the layouts to run, and the default layouts that are skipped, each with the reason.

    Args:
        wanted: requested layouts; empty to run the default layouts.
        defaults: layouts to run if none is requested.
        shape: shape of the model; None if unknown.
        device: device to run on.

    Raises:
        ParallelError: the model or the device does not support a requested layout.
    """
    wanted = list(wanted)
    for text in wanted:
        _check(Layout.parse(text), shape, device)
    if wanted:
        return wanted, {}
    chosen, left_out = [], {}
    for text in defaults:
        try:
            _check(Layout.parse(text), shape, device)
        except ParallelError as error:
            left_out[text] = error.message
        else:
            chosen.append(text)
    return chosen, left_out


def _check(layout: Layout, shape: ModelShape | None, device: Device) -> None:
    if shape is not None:
        preflight(layout, shape, ranks=device.ranks)
    elif device.ranks is not None and layout.world > device.ranks:
        raise ParallelError(
            f"{layout} needs {layout.world} ranks, got {device.ranks}.",
            code="parallel_degree",
            hint=f"pass a layout of at most {device.ranks} ranks",
        )
