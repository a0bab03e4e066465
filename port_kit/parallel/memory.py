"""Allocation of parameters that were built on the meta device, and their local sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from port_kit.upstream.checks import require

require("module_internals")


def materialize(module: nn.Module, device: torch.device) -> None:
    """Allocate a module's meta parameters on a device, uninitialized.

    Unlike ``Module.to_empty``, keep the parameters' classes and attributes, such as vLLM's ``weight_loader``.
    """
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                owner._parameters[leaf] = _real(parameter, device)


def _real(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    real = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
    if not isinstance(parameter, DTensor):
        real.__class__ = type(parameter)
        real.__dict__.update(parameter.__dict__)
    return real


def local_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters on this rank, without those on the meta device."""
    local = (local_shard(parameter) for parameter in module.parameters())
    return sum(part.numel() * part.element_size() for part in local if part.device.type != "meta")


def local_shard(parameter: Tensor) -> Tensor:
    """Return this rank's shard of a parameter under HSDP, else the parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
