"""Blocks of a module: members of its outermost module lists, and what each was called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from port_kit.autoparallel.observe import block_paths
from port_kit.autoparallel.tree import rebuild
from port_kit.upstream.checks import require

require("convolution_base")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class BlockCalls:
    """Observation of one forward of a module.

    Attributes:
        first: arguments of the first call of each block, by path.
        outside: modules of blocks that were called outside of their block, by path.
        rows: rows of the input of each linear, all calls added, by path.
    """

    first: dict[str, Arguments] = field(default_factory=dict)
    outside: set[str] = field(default_factory=set)
    rows: dict[str, int] = field(default_factory=dict)


def structure(block: nn.Module) -> tuple[Any, ...]:
    """Return a key that blocks of equal structure share: classes of modules and parameters, without sizes."""
    return (
        *((path, type(module).__qualname__) for path, module in block.named_modules()),
        *((name, parameter.dim()) for name, parameter in block.named_parameters()),
    )


def call_model(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call a module without gradients."""
    with torch.no_grad():
        return model(**inputs)


def observe_blocks(model: nn.Module, inputs: Mapping[str, Any]) -> BlockCalls:
    """Run a module once and record the calls of its blocks."""
    calls, hooks = BlockCalls(), []
    active: list[str] = []
    paths = block_paths(model)
    for path in paths:
        hooks += _block_hooks(model.get_submodule(path), path, calls, active)
    for path, module in model.named_modules():
        owner = next((b for b in paths if path.startswith(f"{b}.")), None)
        if owner is not None:
            hooks.append(module.register_forward_pre_hook(_outside_hook(path, owner, calls, active)))
        if is_linear(module):
            hooks.append(module.register_forward_pre_hook(_linear_hook(path, calls), with_kwargs=True))
    try:
        call_model(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _block_hooks(block: nn.Module, path: str, calls: BlockCalls, active: list[str]) -> list[Any]:
    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        active.append(path)
        if path not in calls.first:
            calls.first[path] = copy_arguments((args, kwargs))

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        active.pop()

    return [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]


def _outside_hook(path: str, owner: str, calls: BlockCalls, active: list[str]) -> Any:
    def record(_module: nn.Module, _args: Any) -> None:
        if owner not in active:
            calls.outside.add(path)

    return record


def _linear_hook(path: str, calls: BlockCalls) -> Any:
    def record(_module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        calls.rows[path] = calls.rows.get(path, 0) + x.numel() // max(x.shape[channel_axis(_module, x)], 1)

    return record


def copy_arguments(given: Arguments) -> Arguments:
    """Return a copy in which tensors are cloned."""
    args, kwargs = rebuild(given, lambda _path, x: x.detach().clone() if torch.is_tensor(x) else x)
    return args, kwargs


def is_linear(module: nn.Module) -> bool:
    """Return True for a module whose output channels are linear functions of its input channels, with one weight."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1
    return isinstance(module, nn.Linear)


def channel_axis(module: nn.Module, x: Tensor) -> int:
    """Return the axis of channels of a linear's input or output."""
    if isinstance(module, nn.modules.conv._ConvNd) and not is_channels_last(module):
        return x.dim() - 1 - len(module.kernel_size)
    return x.dim() - 1


def is_channels_last(conv: nn.Module) -> bool:
    """Return True if a convolution's class reads channels from the last axis, as found by a call with zeros."""
    assert isinstance(conv, nn.modules.conv._ConvNd)
    if type(conv).forward in _CHANNELS_FIRST:
        return False
    # sizes that cannot be mistaken for the channels
    spatial = (conv.in_channels + reach for reach in conv.kernel_size)
    probe = conv.weight.new_zeros(1, *spatial, conv.in_channels)
    try:
        with torch.no_grad():
            return bool(type(conv).forward(conv, probe).shape[-1] == conv.out_channels)
    except RuntimeError:  # the last axis does not hold the channels
        return False


_CHANNELS_FIRST = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
