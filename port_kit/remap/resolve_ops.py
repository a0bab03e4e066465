"""From the ops of a rule to tensor operations, once shapes and sizes are known.

``split``, ``concat``, ``stack`` and joining transforms decide which source and target a part belongs to; see
:mod:`port_kit.remap.resolve`. The ops here map one tensor to one tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from port_kit.errors import RemapError
from port_kit.escape import quoted
from port_kit.regions import Region, Shape
from port_kit.remap.ops import Op, parse_rearrange, region_bounds
from port_kit.remap.patterns import evaluate
from port_kit.remap.problems import remap_error
from port_kit.remap.tensor_ops import Call, Cast, Fill, Permute, Reorder, Reshape, Slice, TensorOp
from port_kit.remap.transforms import find_transform


class Scope:
    """The names that a rule's expressions may use for one source tensor, computed on first use."""

    def __init__(self, sizes: Mapping[str, int], rule: str, name: str, match: re.Match[str], shape: Shape) -> None:
        self._sizes, self._rule, self._name, self._match, self._shape = sizes, rule, name, match, shape

    @property
    def where(self) -> str:
        """The rule and the tensor, as messages name them."""
        return f"rule {quoted(self._rule)} on {self._name}"

    @cached_property
    def names(self) -> Mapping[str, int]:
        """Named sizes, the source's extents (``in0`` ...), and the numeric groups (``_1`` ... and by name)."""
        extents = {f"in{axis}": extent for axis, extent in enumerate(self._shape)}
        groups = {f"_{number}": text for number, text in enumerate(self._match.groups(), 1)} | self._match.groupdict()
        numbers = {key: int(text) for key, text in groups.items() if text and text.isdecimal()}
        return {**self._sizes, **extents, **numbers}

    def size(self, expression: int | str) -> int:
        """Evaluate a size; raises ``remap_size``."""
        return evaluate(expression, self.names, self.where)


def resolve_op(op: Op, shape: Shape, scope: Scope, target: Shape) -> list[TensorOp]:
    """Return the tensor operations of an op that maps one tensor to one tensor.

    Args:
        op: any op but split, concat, stack and joining transforms.
        shape, scope: the shape of its input, and the names of size expressions.
        target: the shape of the target region, for ``reshape`` without a shape and ``fill``.

    Raises:
        RemapError: ``remap_shape`` or ``remap_size`` if the op does not fit the shape.
    """
    resolver = _RESOLVERS.get(op.name, _resolve_call)
    return [each for each in resolver(op, shape, scope, target) if not _is_identity(each)]


def _is_identity(op: TensorOp) -> bool:
    if isinstance(op, Permute):
        return list(op.perm) == list(range(len(op.perm)))
    return isinstance(op, (Reshape, Fill)) and op.before == op.after


def _resolve_reshape(op: Op, shape: Shape, scope: Scope, target: Shape) -> list[TensorOp]:
    after = target if op.get("shape") is None else tuple(scope.size(size) for size in op.get("shape"))
    if after.count(-1) == 1:
        known = -math.prod(after)
        after = tuple(math.prod(shape) // known if size == -1 and known else size for size in after)
    if math.prod(after) != math.prod(shape) or min(after, default=0) < 0:
        raise _shape_error(f"reshape of {list(shape)} to {list(after)}", "the same number of elements", scope)
    return [Reshape(shape, after)]


def _resolve_transpose(op: Op, shape: Shape, scope: Scope, target: Shape) -> list[TensorOp]:
    rank = len(shape)
    perm = op.get("perm")
    if perm is None:
        perm = (*range(rank - 2), rank - 1, rank - 2) if rank > 1 else (0,) * rank
    if sorted(perm) != list(range(rank)):
        raise _shape_error(f"transpose {list(perm)} of shape {list(shape)}", f"each of {rank} axes once", scope)
    return [Permute(tuple(perm), shape)]


def _resolve_reorder(op: Op, shape: Shape, scope: Scope, target: Shape) -> list[TensorOp]:
    dim = axis_of(op, shape, scope)
    if op.get("runs") is not None:
        runs = tuple((scope.size(start), scope.size(stop)) for start, stop in op.get("runs"))
    else:
        parts, order = scope.size(op.get("parts", 2)), op.get("order", (1, 0))
        if parts < 1 or shape[dim] % parts or sorted(order) != list(range(parts)):
            given = f"reorder of {shape[dim]} in {parts} parts as {list(order)}"
            raise _shape_error(given, "equal parts, each once", scope)
        size = shape[dim] // parts
        runs = tuple((part * size, (part + 1) * size) for part in order)
    bounds = [0, *(bound for run in sorted(runs) for bound in run), shape[dim]]
    if bounds != sorted(bounds) or any(start == stop for start, stop in runs):
        raise _shape_error(f"runs {list(runs)} on an axis of {shape[dim]}", "disjoint runs inside it", scope)
    return [Reorder(dim, runs, shape)]


def _resolve_fill(op: Op, shape: Shape, scope: Scope, target: Shape) -> list[TensorOp]:
    if math.prod(shape) != 1:
        raise _shape_error(f"fill with shape {list(shape)}", "a source of one value", scope)
    return [Fill(shape, target)]


def _resolve_call(op: Op, shape: Shape, scope: Scope, target: Shape) -> list[TensorOp]:
    after = find_transform(op.name).shape({"": shape}, dict(op.args))
    return [Call(op.name, op.args, shape, tuple(after))]


def axis_of(op: Op, shape: Shape, scope: Scope) -> int:
    """Return the axis of an op; negative ones count from the end."""
    dim = op.get("dim")
    if not isinstance(dim, int) or not -len(shape) <= dim < len(shape):
        raise _shape_error(f"{op.name} on axis {dim} of shape {list(shape)}", "an axis that exists", scope)
    return dim % len(shape)


def _resolve_rearrange(op: Op, shape: Shape, scope: Scope, target: Shape) -> list[TensorOp]:
    left, right = parse_rearrange(op.get("pattern"))
    sizes = {name: scope.size(size) for name, size in op.get("sizes", ())}
    if ["..."] in left:
        hidden = [[f"...{number}"] for number in range(len(shape) - len(left) + 1)]
        left, right = (
            [axis for part in side for axis in (hidden if part == ["..."] else [part])] for side in (left, right)
        )
    if len(left) != len(shape):
        raise _shape_error(f"rearrange {quoted(op.get('pattern'))} of shape {list(shape)}", f"{len(left)} axes", scope)
    for axis, extent in zip(left, shape, strict=True):
        _infer(axis, extent, sizes, scope)
    atoms = [name for axis in left for name in axis]
    split = tuple(sizes[name] for name in atoms)
    permute = Permute(tuple(atoms.index(name) for axis in right for name in axis), split)
    after = tuple(math.prod(sizes[name] for name in axis) for axis in right)
    return [Reshape(shape, split), permute, Reshape(permute.after, after)]


def _infer(axis: list[str], extent: int, sizes: dict[str, int], scope: Scope) -> None:
    unknown = [name for name in axis if name not in sizes]
    known = math.prod(sizes[name] for name in axis if name in sizes)
    if len(unknown) == 1 and known > 0 and extent % known == 0:
        sizes[unknown[0]] = extent // known
    elif unknown or known != extent:
        given, required = f"an axis of {extent} as ({' '.join(axis)})", "sizes for all but one name that multiply to it"
        raise _shape_error(given, required, scope)


def resolve_region(text: str, shape: Shape, scope: Scope) -> tuple[Region, Shape]:
    """Read ``[\\2, 0:f]`` for a shape.

    Returns:
        The region, and the shape of its content without the axes that are given by an index.
    """
    parts = region_bounds(text)
    if len(parts) > len(shape):
        raise _shape_error(f"part {text} of shape {list(shape)}", "at most one entry per axis", scope)
    region, content = [], []
    for axis, extent in enumerate(shape):
        part = parts[axis] if axis < len(parts) else ("", "")
        start = scope.size(part[0]) if part[0] else 0
        stop = start + 1 if len(part) == 1 else scope.size(part[1]) if part[1] else extent
        if not 0 <= start < stop <= extent:
            raise _shape_error(f"part {text} of shape {list(shape)}: {start}:{stop}", "a part inside it", scope)
        region.append((start, stop))
        if len(part) > 1:
            content.append(stop - start)
    return tuple(region), tuple(content)


def resolve_take(text: str, shape: Shape, scope: Scope) -> list[TensorOp]:
    """Return the operations of a rule's ``take``."""
    if not text:
        return []
    region, content = resolve_region(text, shape, scope)
    taken = Slice(region, shape)
    return [taken] if content == taken.after else [taken, Reshape(taken.after, content)]


def _shape_error(given: str, required: str, scope: Scope) -> RemapError:
    return remap_error("remap_shape", f"{scope.where}: found {given}; expected {required}")


_RESOLVERS: dict[str, Callable[[Any, Shape, Scope, Shape], list[TensorOp]]] = {
    "copy": lambda *_: [],
    "reshape": _resolve_reshape,
    "transpose": _resolve_transpose,
    "rearrange": _resolve_rearrange,
    "reorder": _resolve_reorder,
    "cast": lambda op, shape, *_: [Cast(op.get("dtype"), shape)],
    "fill": _resolve_fill,
}
