"""A block run as one rank would run it, in one process, with recorded values in place of communication.

A run of the complete block records the input and output of each linear that is split. The trial gives column linears'
outputs as the rank's part of the recorded ones, compares the inputs of row linears with the rank's part of the recorded
ones, and continues with the recorded outputs. The code between them is the block's own. So a trial shows if that code
is correct on a part of the channels, and for which group of linears it is not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from port_kit.autoparallel.tensor.blocks import Arguments, channel_axis, copy_arguments
from port_kit.autoparallel.tensor.groups import Groups, Segment
from port_kit.autoparallel.tree import Arguments as Names
from port_kit.autoparallel.tree import leaves, rebuild
from port_kit.escape import reason_of

#: Largest difference relative to the largest magnitude, float32.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Failure:
    """A difference or an exception.

    Attributes:
        group: group of the linear whose input was being computed, or None for the result of the block.
        order: number of linears that agreed before.
        reason: the exception or the difference.
    """

    group: int | None
    order: int
    reason: str


class Mismatch(Exception):
    """An input differs from the recorded one."""


@dataclass
class Recording:
    """Inputs and outputs of the modules that are split, per call, and the result of the block."""

    calls: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    order: list[str] = field(default_factory=list)
    result: tuple[Tensor, ...] = ()


def part(segments: Sequence[Segment], rank: int, ranks: int) -> Tensor:
    """Return the entries of an axis that a rank holds, in order."""
    entries, at = [], 0
    for segment in segments:
        size = segment.size // ranks
        entries.append(torch.arange(at + rank * size, at + (rank + 1) * size))
        at += segment.size
    return torch.cat(entries)


def record(block: nn.Module, given: Arguments, groups: Groups) -> Recording:
    """Run a block completely and record the modules that are split."""
    recording, hooks = Recording(), []
    for path in {side.module for side in groups.sides}:

        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Tensor, path: str = path) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            recording.calls[path].append((x.detach().clone(), output.detach().clone()))
            recording.order.append(path)

        hooks.append(block.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
    try:
        recording.result = _run(block, given)
    finally:
        for one in hooks:
            one.remove()
    return recording


def try_rank(
    block: nn.Module,
    given: Arguments,
    groups: Groups,
    recording: Recording,
    *,
    rank: int,
    ranks: int,
    values: Mapping[tuple[Any, str], Any],
) -> Failure | None:
    """Run a block as a rank; return the first failure, or None if everything agrees.

    Args:
        block, given, groups, recording: as for :func:`record`.
        rank, ranks: of the tensor-parallel group.
        values: values of attributes during the run, by object and attribute.
    """
    rest = list(recording.order)
    done: list[str] = []
    with ExitStack() as stack:
        for (owner, name), value in values.items():
            stack.enter_context(_attribute(owner, name, value))
        stack.enter_context(_sliced_parameters(block, groups, rank, ranks))
        for path in recording.calls:
            stack.enter_context(_recorded(block, path, groups, recording, done, rank, ranks))
        try:
            found = _run(block, _sliced_inputs(block, given, groups, rank, ranks))
            if not _agree(found, recording.result):
                return Failure(None, len(done), "the result of the block differs")
            return None
        except Exception as error:  # any error of the block's code means that its numbers do not fit
            after = rest[len(done)] if len(done) < len(rest) else ""
            return Failure(_group_of(after, groups), len(done), f"{type(error).__name__}: {reason_of(error)}")


def _group_of(path: str, groups: Groups) -> int | None:
    found = [segments[0].group for side, segments in groups.sides.items() if side.module == path]
    return found[0] if found else None


def _run(block: nn.Module, given: Arguments) -> tuple[Tensor, ...]:
    args, kwargs = copy_arguments(given)
    with torch.no_grad():
        result = block(*args, **kwargs)
    return tuple(x for _, x in leaves(result) if torch.is_tensor(x))


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(agree, found, expected))


def agree(found: Tensor, expected: Tensor) -> bool:
    """Return True if two tensors are equal up to rounding."""
    if found.shape != expected.shape:
        return False
    if not expected.numel() or not expected.is_floating_point():
        return bool(torch.equal(found, expected))
    scale = float(expected.abs().max())
    return bool(((found - expected).abs().max() <= TOLERANCE * max(scale, 1e-30)).item())


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _sliced_parameters(block: nn.Module, groups: Groups, rank: int, ranks: int) -> Iterator[None]:
    names = {axis.name for axis in groups.axes if axis.kind == "parameter"}
    tensors = {name: block.get_parameter(name) for name in names}
    before = {name: tensor.data for name, tensor in tensors.items()}
    for axis, segments in groups.axes.items():
        if axis.kind == "parameter":
            index = part(segments, rank, ranks)
            tensors[axis.name].data = tensors[axis.name].data.index_select(axis.dim, index)
    try:
        yield
    finally:
        for name, tensor in tensors.items():
            tensor.data = before[name]


def _sliced_inputs(block: nn.Module, given: Arguments, groups: Groups, rank: int, ranks: int) -> Arguments:
    table = {(axis.name, axis.dim): part(s, rank, ranks) for axis, s in groups.axes.items() if axis.kind == "input"}

    def change(path: str, x: Any) -> Any:
        for (name, dim), index in table.items():
            if name == path and torch.is_tensor(x):
                x = x.index_select(dim, index)
        return x

    names = Names(block)
    return names.split(rebuild(names.named(*given), change), given[0])


@contextmanager
def _recorded(
    block: nn.Module, path: str, groups: Groups, recording: Recording, done: list[str], rank: int, ranks: int
) -> Iterator[None]:
    """Replace the forward of a module that is split by its recorded calls."""
    module, count = block.get_submodule(path), iter(recording.calls[path])
    sides = {side.kind: segments for side, segments in groups.sides.items() if side.module == path}
    before_norm = sides.get("norm", ())
    expected_in, given_out = sides.get("in", before_norm), sides.get("out", before_norm)

    def forward(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        recorded_in, recorded_out = next(count)
        if not agree(x, _slice(module, recorded_in, expected_in, rank, ranks)):
            raise Mismatch(f"the input of {path} differs")
        done.append(path)
        return _slice(module, recorded_out, given_out, rank, ranks).clone()

    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


def _slice(module: nn.Module, x: Tensor, segments: Sequence[Segment], rank: int, ranks: int) -> Tensor:
    return x.index_select(channel_axis(module, x), part(segments, rank, ranks)) if segments else x
