"""Modules with given names and shapes, and a rule set with every op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from port_kit.manifest import Manifest


def module_of(shapes: Mapping[str, Sequence[int]], *, buffers: Sequence[str] = (), dtype: str = "float32") -> nn.Module:
    """A module whose parameters and buffers have these names; every element is NaN, or -1 for integers."""
    root = nn.Module()
    for name, shape in shapes.items():
        owner = root
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        value = torch.full(tuple(shape), float("nan")).to(getattr(torch, dtype))
        if name in buffers:
            owner.register_buffer(leaf, value)
        else:
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    return root


def manifest_of(shapes: Mapping[str, Sequence[int]], dtype: str = "float32") -> Manifest:
    return Manifest({name: (shape, dtype) for name, shape in shapes.items()}, origin="shapes")


def zeros(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Zeros with these names and shapes, in float32."""
    return {name: torch.zeros(tuple(shape)) for name, shape in shapes.items()}
