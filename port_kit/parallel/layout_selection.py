"""Which layouts ``verify parallel`` runs on which device: what the model or the machine cannot have is not begun."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from port_kit.errors import ParallelError
from port_kit.parallel.layout import Layout
from port_kit.parallel.meta_init import meta_init
from port_kit.parallel.preflight import ModelShape, describe_model, preflight
from port_kit.port import Port, resolve

if TYPE_CHECKING:
    from port_kit.parallel.verify import ParallelTestCase

#: Largest absolute difference of an output from one rank's on a GPU, float32: kernels differ with the shapes of parts.
GPU_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Device:
    """Where ranks run.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        ranks: devices that there are; None where processes are devices.
        tolerance: largest absolute difference that rounding explains.
        config: fields of ``OmniDiffusionConfig`` that the comparison needs there.
    """

    kind: str
    ranks: int | None
    tolerance: float
    config: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self, test_case: ParallelTestCase) -> ParallelTestCase:
        """Return the test case with what this device needs."""
        return replace(test_case, config={**test_case.config, **self.config})


def find_device(wanted: str, tolerance: float) -> Device:
    """Return the device that this environment's vLLM runs on; nothing is initialised there.

    Args:
        wanted: ``auto``, ``cpu`` or ``cuda``.
        tolerance: on a CPU.

    Raises:
        ParallelError: vLLM is built for another device.
    """
    from vllm_omni.platforms import current_omni_platform

    kind = "cuda" if current_omni_platform.is_cuda() else "cpu"
    if wanted not in ("auto", kind):
        raise ParallelError(
            f"device {wanted} was asked for; the vLLM of this environment runs on {kind}",
            code="parallel_device",
            hint=f"use --device {kind}, or an environment whose vLLM is built for {wanted}",
            device=wanted,
        )
    if kind == "cpu":
        return Device(kind, None, tolerance)
    # Float32 shows a fault that bfloat16's rounding would hide; of the attention kernels, SDPA's take it.
    config = {"diffusion_attention_backend": "TORCH_SDPA"}
    return Device(kind, torch.cuda.device_count(), max(tolerance, GPU_TOLERANCE), config)


def read_model_shape(port: Port, model: Path) -> ModelShape | None:
    """Read what decides a port's layouts; None where the port does not name its transformer or its branches."""
    names = {component.name: component for component in port.components}
    branches = getattr(resolve(port.pipeline), "guidance_branches", None)
    config = model / "transformer" / "config.json"
    if "transformer" not in names or branches is None or not config.is_file():
        return None
    build: Any = resolve(names["transformer"].build)
    with meta_init(torch.float32):
        return describe_model(build(json.loads(config.read_text(encoding="utf-8"))), branches=branches)


def choose_layouts(
    wanted: Iterable[str], defaults: Iterable[str], shape: ModelShape | None, device: Device
) -> tuple[list[str], dict[str, str]]:
    """Return the layouts to run, and those of the defaults that are left out, each with the reason.

    Args:
        wanted: layouts that somebody asked for; empty for the defaults.
        defaults: the layouts to take otherwise.
        shape: of the model; None where they are not known.
        device: where they would run.

    Raises:
        ParallelError: a layout that was asked for is impossible; says what is possible.
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
            f"{layout} needs {layout.world} ranks and there are {device.ranks}",
            code="parallel_degree",
            hint=f"use layouts of at most {device.ranks} ranks",
        )
