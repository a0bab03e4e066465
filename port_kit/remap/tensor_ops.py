"""Tensor operations between a checkpoint and a parameter, with all numbers known.

Each operation knows its shapes, maps regions of its result to regions of its input, and runs on tensors, as a view if
possible. :func:`apply_inverse` writes a value to the elements that :func:`apply` would read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import TYPE_CHECKING

from port_kit.errors import RemapError
from port_kit.regions import Region, Shape, full_region, region_index, region_shape, reshaped, shifted, with_span
from port_kit.remap.transforms import find_transform

if TYPE_CHECKING:
    from torch import Tensor

Run = tuple[int, int]


@dataclass(frozen=True)
class Slice:
    """Select one region."""

    region: Region
    before: Shape

    @property
    def after(self) -> Shape:
        return region_shape(self.region)

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor[region_index(self.region)]

    def source_region(self, regions: Sequence[Region]) -> list[Region]:
        return [shifted(region, self.region) for region in regions]


@dataclass(frozen=True)
class Reshape:
    """View the same elements, in row-major order, under another shape."""

    before: Shape
    after: Shape

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.after)

    def source_region(self, regions: Sequence[Region]) -> list[Region]:
        return reshaped(regions, self.after, self.before)


@dataclass(frozen=True)
class Permute:
    """Permute the axes: output axis i is input axis ``perm[i]``."""

    perm: tuple[int, ...]
    before: Shape

    @property
    def after(self) -> Shape:
        return tuple(self.before[axis] for axis in self.perm)

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self.perm)

    def source_region(self, regions: Sequence[Region]) -> list[Region]:
        order = sorted(range(len(self.perm)), key=self.perm.__getitem__)
        return [tuple(region[axis] for axis in order) for region in regions]


@dataclass(frozen=True)
class Reorder:
    """Concatenate runs of one axis in a new order; runs that leave something out also select."""

    dim: int
    runs: tuple[Run, ...]
    before: Shape

    @property
    def after(self) -> Shape:
        size = sum(stop - start for start, stop in self.runs)
        return (*self.before[: self.dim], size, *self.before[self.dim + 1 :])

    def moves(self) -> list[tuple[int, int, int]]:
        """Return ``(start in the result, start in the input, length)`` of every run."""
        ends = accumulate(stop - start for start, stop in self.runs)
        return [(end - stop + start, start, stop - start) for end, (start, stop) in zip(ends, self.runs, strict=True)]

    def apply(self, tensor: Tensor) -> Tensor:
        import torch

        return torch.cat([tensor.narrow(self.dim, start, length) for _, start, length in self.moves()], self.dim)

    def source_region(self, regions: Sequence[Region]) -> list[Region]:
        found = []
        for region, (at, start, length) in product(regions, self.moves()):
            first, last = max(region[self.dim][0], at), min(region[self.dim][1], at + length)
            if first < last:
                found.append(with_span(region, self.dim, first - at + start, last - at + start))
        return found


@dataclass(frozen=True)
class Cast:
    """Change the dtype because a rule asks for it."""

    dtype: str
    after: Shape

    def apply(self, tensor: Tensor) -> Tensor:
        import torch

        return tensor.to(getattr(torch, self.dtype))

    def source_region(self, regions: Sequence[Region]) -> list[Region]:
        return list(regions)


@dataclass(frozen=True)
class Fill:
    """Repeat one value in every element of a shape, such as a scale that all shards of a parameter share."""

    before: Shape
    after: Shape

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(()).expand(self.after)

    def source_region(self, regions: Sequence[Region]) -> list[Region]:
        return [full_region(self.before)] if regions else []

    def invert(self, tensor: Tensor) -> Tensor:
        """Return the one value.

        Raises:
            RemapError: ``remap_op`` if the elements differ.
        """
        one = tensor.reshape(-1)[:1]
        if not bool((tensor == one).all()):
            found = f"expected {tensor.numel()} equal elements, found {len(tensor.unique())} different values"
            hint = "export the elements by rules of their own"
            raise RemapError(f"fill cannot be inverted: {found}", code="remap_op", hint=hint)
        return one.reshape(self.before)


@dataclass(frozen=True)
class Call:
    """Run a registered transform of one tensor; any element of the result may depend on any element of the input."""

    name: str
    args: tuple[tuple[str, object], ...]
    before: Shape
    after: Shape

    def apply(self, tensor: Tensor) -> Tensor:
        return find_transform(self.name).run({"": tensor}, dict(self.args), self.after)

    def source_region(self, regions: Sequence[Region]) -> list[Region]:
        return [full_region(self.before)] if regions else []

    def invert(self, tensor: Tensor) -> Tensor:
        return find_transform(self.name).undo(tensor, dict(self.args), {"": self.before})[""]


TensorOp = Slice | Reshape | Permute | Reorder | Cast | Fill | Call


def source_region(ops: Sequence[TensorOp], regions: Sequence[Region]) -> list[Region]:
    """Return the regions of the input that some regions of the result come from."""
    found = list(regions)
    for op in reversed(ops):
        found = op.source_region(found)
    return found


def apply(tensor: Tensor, ops: Sequence[TensorOp]) -> Tensor:
    """Run operations on a tensor; returns a view of it if no operation copies or computes elements."""
    for op in ops:
        tensor = op.apply(tensor)
    return tensor


def copy_into(destination: Tensor, tensor: Tensor, ops: Sequence[TensorOp]) -> None:
    """Write ``apply(tensor, ops)`` into ``destination``, copying each element once.

    A last :class:`Reorder` is copied run by run, and a last :class:`Cast` to the destination's dtype is left to the
    copy, so that neither allocates a temporary tensor.
    """
    ops = list(ops)
    while ops and isinstance(ops[-1], Cast) and str(destination.dtype) == f"torch.{ops[-1].dtype}":
        ops.pop()
    if not ops or not isinstance(ops[-1], Reorder):
        destination.copy_(apply(tensor, ops))
        return
    last, tensor = ops[-1], apply(tensor, ops[:-1])
    for at, start, length in last.moves():
        destination.narrow(last.dim, at, length).copy_(tensor.narrow(last.dim, start, length))


def apply_inverse(destination: Tensor, ops: Sequence[TensorOp], value: Tensor) -> None:
    """Write ``value`` to the elements of ``destination`` that ``apply(destination, ops)`` would read.

    This inverts a load. It is exact for all operations but casts and transforms, which round as their inverse does.
    """
    ops = [op for op in ops if not isinstance(op, Cast)]  # the copy casts back
    if not ops:
        destination.copy_(value)
        return
    op, rest = ops[0], ops[1:]
    result = destination.new_empty(op.after) if isinstance(op, (Call, Fill)) else op.apply(destination)
    apply_inverse(result, rest, value)
    if isinstance(op, (Call, Fill)):
        destination.copy_(op.invert(result))
    elif isinstance(op, Reshape) and result.data_ptr() != destination.data_ptr():
        destination.copy_(result.reshape(op.before))
    elif isinstance(op, Reorder):
        for at, start, length in op.moves():
            destination.narrow(op.dim, start, length).copy_(result.narrow(op.dim, at, length))
