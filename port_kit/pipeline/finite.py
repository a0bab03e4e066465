"""Checks for values that are not finite: in weights when they are loaded, and in outputs before they are encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from port_kit.errors import InputError, PortKitError
from port_kit.pipeline.model_index import incomplete

#: Elements of an eight-bit tensor that are converted at a time.
_CHUNK = 2**26


def check_output(name: str, value: Tensor, magnitudes: Sequence[str]) -> None:
    """Refuse a result with NaN or infinity.

    Args:
        name: modality.
        value: decoded samples or pixels, or latents.
        magnitudes: what the request sets that may make values overflow.

    Raises:
        InputError: ``output_not_finite``; a setting of the request may be the cause.
        PortKitError: ``output_not_finite``; the request sets nothing unusual.
    """
    if not bool(is_finite(value)):
        kind, hint = PortKitError, "check the weights (port-kit download PORT --verify) and the dtype of the engine"
        if magnitudes:
            kind, hint = InputError, f"use smaller values of {', '.join(magnitudes)}"
        raise kind(f"the {name} of the result has values that are not finite", code="output_not_finite", hint=hint)


def check_weights(module: nn.Module, model: str | Path) -> None:
    """Refuse weights with NaN or infinity, in one pass over what this rank holds.

    Args:
        module: a loaded pipeline; the first part of a tensor's name is its folder in the model directory.
        model: the model directory.

    Raises:
        PortKitError: ``model_incomplete``; the message has the tensor and its file.
    """
    tensors = dict(_floating(module))
    flags: dict[torch.device, list[Tensor]] = {device: [] for device in {tensor.device for tensor in tensors.values()}}
    for tensor in tensors.values():
        flags[tensor.device].append(is_finite(tensor))
    if all(bool(torch.stack(found).all()) for found in flags.values()):
        return
    wrong = next(name for name, tensor in tensors.items() if not bool(is_finite(tensor)))
    folder = Path(model) / wrong.partition(".")[0]
    raise incomplete(f"{_source_of(folder) or f'{wrong} of {folder}'} has values that are not finite")


def is_finite(tensor: Tensor) -> Tensor:
    """Return whether all values are finite, a 0-dim boolean on the device of the tensor."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    if tensor.dtype.itemsize == 1:  # eight-bit floats have no reductions
        parts = [part.to(torch.bfloat16) for part in tensor.reshape(-1).split(_CHUNK)]
        return torch.stack([is_finite(part) for part in parts]).all()
    low, high = torch.aminmax(tensor.detach())  # reads the tensor once, and keeps NaN
    return torch.isfinite(low) & torch.isfinite(high)


def _floating(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's part of every parameter and of every persistent buffer with floating-point values."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        local = getattr(tensor, "to_local", lambda tensor=tensor: tensor)()
        if isinstance(local, Tensor) and local.is_floating_point() and local.device.type != "meta":
            yield name, local


def _source_of(folder: Path) -> str:
    """Return the first tensor of a checkpoint with values that are not finite, with its file; empty if none has any."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not bool(is_finite(tensor)):
                    return f"{name} of {file}"
    return ""
