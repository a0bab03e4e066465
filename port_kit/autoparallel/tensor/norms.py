"""Norms over all channels, recognized by their values."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from port_kit.autoparallel.tensor.blocks import Arguments, copy_arguments, is_linear

NormKind = Literal["rms", "layer"]


def full_width_norms(block: nn.Module, given: Arguments) -> dict[str, NormKind]:
    """Return the modules that compute an RMS norm or a layer norm over their last axis, by comparison of values."""
    kinds: dict[str, NormKind | None] = {}
    hooks = []
    for path, module in block.named_modules():
        if is_linear(module) or any(module.children()):
            continue

        def compare(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            found = _norm_kind(module, args, output)
            kinds[path] = found if kinds.get(path, found) == found else None

        hooks.append(module.register_forward_hook(compare))
    try:
        args, kwargs = copy_arguments(given)
        with torch.no_grad():
            block(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: kind for path, kind in kinds.items() if kind}


def _norm_kind(module: nn.Module, args: tuple[Any, ...], output: Any) -> NormKind | None:
    plain = len(args) == 1 and torch.is_tensor(args[0]) and torch.is_tensor(output) and args[0].shape == output.shape
    if not plain or not args[0].is_floating_point() or output.shape[-1] < 4:
        return None
    x = args[0].float()
    for kind in ("rms", "layer"):
        try:
            expected = apply_norm(module, x, x, kind, x.shape[-1])  # type: ignore[arg-type]
        except RuntimeError:  # the parameters do not fit the last axis
            return None
        if torch.allclose(expected, output.float(), rtol=1e-4, atol=1e-5):
            return kind  # type: ignore[return-value]
    return None


def apply_norm(module: nn.Module, x: Tensor, wide: Tensor, kind: NormKind, dim: int) -> Tensor:
    """Return a norm's result by its formula, with the module's ``eps``, ``weight`` and ``bias``."""
    known = norm_eps(module)
    eps = torch.finfo(x.dtype).eps if known is None else known
    if kind == "layer":
        wide = wide - wide.sum(-1, keepdim=True) / dim
    wide = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / dim + eps)
    for name in ("weight", "bias"):
        parameter = getattr(module, name, None)
        if parameter is not None:
            wide = wide * parameter if name == "weight" else wide + parameter
    return wide


def norm_eps(module: nn.Module) -> float | None:
    """Return the number that a norm adds to its mean square; None for that of torch's RMS norm, by dtype."""
    for name in ("eps", "variance_epsilon", "epsilon"):
        if isinstance(getattr(module, name, None), float):
            return float(getattr(module, name))
    return None
