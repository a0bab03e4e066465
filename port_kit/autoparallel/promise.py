"""Promise tensors: results of calls that other ranks of a guidance group compute.

Every rank runs the same pipeline code. A call of the transformer is computed by one rank; on all ranks its result is a
:class:`Promise`. A promise has shape, dtype and device, and can be viewed. The first operation that reads its values
exchanges all pending results. Because the code is the same on all ranks, they reach that operation together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from port_kit.upstream.checks import require

require("function_subclass")

#: Functions that read no values. Their tensor results are promises if they share the storage of the argument.
_VIEWS = frozenset(
    "__get__ __getitem__ bfloat16 chunk contiguous detach diagonal double expand expand_as flatten float half "
    "movedim moveaxis narrow permute reshape reshape_as select split split_with_sizes squeeze swapaxes swapdims t "
    "tensor_split to transpose type_as unbind unflatten unsqueeze view view_as".split()
)
#: Functions that return properties other than values.
_FACTS = frozenset(
    "__hash__ __len__ dim element_size get_device is_complex is_contiguous is_floating_point ndimension nelement numel "
    "size storage_offset stride".split()
)


class Group(Protocol):
    """Ranks that share the branches of a step.

    Attributes:
        rank: number of this rank within the group.
        size: number of ranks.
    """

    rank: int
    size: int

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite a contiguous tensor with that of the rank ``source``, on all ranks."""


@dataclass
class PendingCall:
    """A call of the transformer whose result has not been exchanged.

    Attributes:
        owner: rank that computes it.
        tensors: its results on the owner, memory of the same shapes elsewhere.
        repeat: run the call on this rank and ignore the result.
        settled: the tensors have their values on all ranks.
    """

    owner: int
    tensors: list[Tensor]
    repeat: Callable[[], object]
    settled: bool = False


@dataclass
class PendingCalls:
    """The calls since the last exchange.

    Attributes:
        group: ranks that share them.
        keeps_pace: every rank must run equally many calls, since the module communicates within the group (HSDP).
        calls: calls in order.
        settled_in_step: number of calls that were exchanged since the last step of the scheduler.
        steps: steps of the scheduler.
    """

    group: Group
    keeps_pace: bool = False
    calls: list[PendingCall] = field(default_factory=list)
    settled_in_step: int = 0
    steps: int = 0

    @property
    def next_owner(self) -> int:
        """The rank that computes the next call."""
        return len(self.calls) % self.group.size

    def settle(self) -> None:
        """Exchange all pending results. A collective call."""
        if not self.calls:
            return
        calls, self.calls = self.calls, []
        idle = -len(calls) % self.group.size
        if self.keeps_pace and self.group.rank >= self.group.size - idle:
            calls[-1].repeat()
        for call in calls:
            for tensor in call.tensors:
                self.group.broadcast(tensor, call.owner)
            call.settled = True
        self.settled_in_step += len(calls)

    def end_step(self) -> None:
        """Note that the scheduler made a step."""
        self.settled_in_step = 0
        self.steps += 1

    def reset(self) -> None:
        """Forget all calls, without communication."""
        self.calls.clear()
        self.settled_in_step = 0


class Promise(Tensor):
    """A tensor whose values may still be computed by another rank. See the module's docstring."""

    _pending: PendingCalls
    _call: PendingCall

    @classmethod
    def of(cls, tensor: Tensor, pending: PendingCalls, call: PendingCall) -> Promise:
        """Return a promise that shares the memory of a tensor."""
        promise = tensor.as_subclass(cls)
        promise._pending, promise._call = pending, call
        return promise

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function: on the memory if it reads no values, else after all pending results were exchanged."""
        kwargs = kwargs or {}
        open_promises = [p for p in promises((args, kwargs)) if not p._call.settled]
        name = getattr(func, "__name__", "")
        if open_promises and (name in _VIEWS or name in _FACTS):
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **kwargs)
                shared = _shares_memory(result, open_promises[0])
            if shared:
                first = open_promises[0]
                return _map_tensors(result, lambda x: cls.of(x, first._pending, first._call))
        for promise in open_promises:
            promise._pending.settle()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*plain(args), **plain(kwargs))


def promises(value: Any) -> Iterator[Promise]:
    """Yield the promises in nested tuples, lists and dicts."""
    if isinstance(value, Promise):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from promises(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from promises(item)


def plain(value: Any) -> Any:
    """Replace settled promises in nested tuples, lists and dicts by ordinary tensors."""
    if not any(True for _ in promises(value)):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return _map_tensors(value, lambda x: x.as_subclass(Tensor) if isinstance(x, Promise) else x)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(item, change) for item in value))
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(item, change) for item in value)
    return value


def _shares_memory(result: Any, promise: Tensor) -> bool:
    """Return True if all tensors of a result are views of a promise, or there is no tensor."""
    storage = promise.untyped_storage()._cdata
    tensors = result if isinstance(result, tuple | list) else [result]
    return all(x.untyped_storage()._cdata == storage for x in tensors if isinstance(x, Tensor))
