"""Parameters without memory: modules are made on the meta device, cut to this rank's share, and only then given any."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def materialize(module: nn.Module, device: torch.device) -> None:
    """Put a module's parameters that are on the meta device on another one, uninitialised.

    ``Module.to_empty`` does so too, but makes plain parameters of vLLM's, which then have no loaders.
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
    """Return the bytes of parameters that this rank holds of a module; those without memory count nothing."""
    local = (local_shard(parameter) for parameter in module.parameters())
    return sum(part.numel() * part.element_size() for part in local if part.device.type != "meta")


def local_shard(parameter: Tensor) -> Tensor:
    """Return what this rank holds of a parameter: its shard under HSDP, else the parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
