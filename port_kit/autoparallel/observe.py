"""Observation of one run of an unmodified module: shapes of arguments, outputs and attention calls.

Attention is observed with a ``TorchFunctionMode``; inference uses it, plans that are applied do not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from port_kit.autoparallel import attention_packages
from port_kit.autoparallel.attention_functions import AttentionCall, is_attention_code, recognize
from port_kit.autoparallel.tree import Arguments, shapes

Shapes = dict[str, "tuple[int, ...] | int"]


@dataclass
class SiteCall:
    """One attention call.

    Attributes:
        module: path of the innermost module that is running.
        call: functions from the module to the call, for :class:`port_kit.autoparallel.plan.AttentionSite`.
        query: shape, [B, N, S, H].
        key: shape, [B, N, S, H].
        mask: shape, or None.
        heads: number of query heads.
    """

    module: str
    call: tuple[str, ...]
    query: tuple[int, ...]
    key: tuple[int, ...]
    mask: tuple[int, ...] | None
    heads: int


@dataclass
class ModuleCall:
    """One call of a module inside of a block."""

    path: str
    inputs: Shapes
    outputs: Shapes


@dataclass
class BlockCall:
    """One call of a block, with the attention and module calls inside of it."""

    path: str
    inputs: Shapes
    outputs: Shapes = field(default_factory=dict)
    sites: list[SiteCall] = field(default_factory=list)
    modules: list[ModuleCall] = field(default_factory=list)

    @property
    def group(self) -> str:
        """Path of the list that contains the block."""
        return self.path.rpartition(".")[0]


@dataclass
class Observation:
    """One run: calls of blocks in order, attention outside of blocks, and the shapes of the result."""

    calls: list[BlockCall] = field(default_factory=list)
    outside: list[SiteCall] = field(default_factory=list)
    outputs: Shapes = field(default_factory=dict)
    result: Any = None


def block_paths(model: nn.Module) -> list[str]:
    """Return the members of lists of modules that are not inside of another such member."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{block}.") for block in found)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and not inside:
            found += [f"{path}.{name}" for name, _ in module.named_children()]
    return found


def observe(model: nn.Module, inputs: dict[str, Any]) -> Observation:
    """Run a module without gradients and return the observation."""
    seen = Observation()
    recorder = _Recorder(model, seen)
    with torch.no_grad(), recorder.hooks(), recorder:
        seen.result = model(**inputs)
    seen.outputs = shapes(seen.result)
    return seen


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, seen: Observation) -> None:
        super().__init__()
        self.model, self.seen = model, seen
        self.blocks = {id(model.get_submodule(path)): path for path in block_paths(model)}
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.running: list[nn.Module] = []
        self.current: list[BlockCall] = []
        self.pending: list[ModuleCall] = []

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.model.modules():
                before = module.register_forward_pre_hook(self._enter(Arguments(module)), with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=False).remove)
            yield

    def _enter(self, names: Arguments) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            path, given = self.paths[id(module)], shapes(names.named(args, kwargs))
            self.running.append(module)
            self.pending.append(ModuleCall(path, given, {}))
            if id(module) in self.blocks and not self.current:
                self.current.append(BlockCall(path, given))

        return hook

    def _leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        self.running.pop()
        call = self.pending.pop()
        call.outputs = shapes(output)
        if not self.current:
            return
        self.current[-1].modules.append(call)
        if self.current[-1].path == call.path:
            block = self.current.pop()
            block.outputs = call.outputs
            self.seen.calls.append(block)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        signature = recognize(func) if self.running else None
        if signature is not None:
            self._site(sys._getframe(1), AttentionCall(signature, func, args, kwargs))
        return func(*args, **kwargs)

    def _site(self, frame: Any, call: AttentionCall) -> None:
        module, mask = self.running[-1], call.mask
        query, key, _ = (x.transpose(1, 2) for x in call.tensors)
        site = SiteCall(
            module=self.paths[id(module)],
            call=call_chain(frame, module, call.signature.name),
            query=tuple(query.shape),
            key=tuple(key.shape),
            mask=tuple(mask.shape) if torch.is_tensor(mask) else None,
            heads=query.shape[1],
        )
        (self.current[-1].sites if self.current else self.seen.outside).append(site)


def call_chain(frame: Any, module: nn.Module, function: str) -> tuple[str, ...]:
    """Return the functions from a module's ``forward`` to the call of an attention function that ``frame`` makes.

    Methods of the module are written as ``forward``, those of its attributes as ``processor.__call__``, and functions
    by their name. The last element is the outermost attention function.
    """
    chain = [function]
    while frame is not None:
        name, owner = frame.f_code.co_name, frame.f_locals.get("self")
        if is_attention_code(frame.f_code):
            chain = [name]
        elif owner is module:
            chain.insert(0, name)
            if name == "forward":
                return tuple(chain)
        elif frame.f_code.co_filename.startswith(_SKIPPED) or name == "__torch_function__":
            pass  # functions of torch, modes and stand-ins
        else:
            chain.insert(0, _function(name, owner, module))
        frame = frame.f_back
    return tuple(chain)


def _function(name: str, owner: Any, module: nn.Module) -> str:
    if owner is not None:
        for attribute, value in vars(module).items():
            if value is owner:
                return f"{attribute}.{name}"
    return name


_SKIPPED = (str(torch.__path__[0]), attention_packages.__file__)
