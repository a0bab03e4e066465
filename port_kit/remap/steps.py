"""Steps: what happens to one tensor between a checkpoint and a parameter, with all numbers known.

Each step knows its shapes, carries regions back through itself, runs on tensors (views where possible), and runs
backwards: :func:`scatter` puts a value to where :func:`gather` would read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from port_kit.errors import RemapError
from port_kit.remap.boxes import Box, Shape, extents, reshaped, whole

if TYPE_CHECKING:
    from torch import Tensor

Run = tuple[int, int]


@dataclass(frozen=True)
class Take:
    """Use only a box."""

    box: Box
    before: Shape

    @property
    def after(self) -> Shape:
        return extents(self.box)

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor[tuple(slice(start, stop) for start, stop in self.box)]

    def back(self, boxes: Sequence[Box]) -> list[Box]:
        return [
            tuple((a + start, b + start) for (a, b), (start, _) in zip(box, self.box, strict=True)) for box in boxes
        ]


@dataclass(frozen=True)
class Reshape:
    """The same elements in row-major order under another shape."""

    before: Shape
    after: Shape

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.after)

    def back(self, boxes: Sequence[Box]) -> list[Box]:
        return reshaped(boxes, self.after, self.before)


@dataclass(frozen=True)
class Permute:
    """Axes in another order: output axis i is input axis ``perm[i]``."""

    perm: tuple[int, ...]
    before: Shape

    @property
    def after(self) -> Shape:
        return tuple(self.before[axis] for axis in self.perm)

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self.perm)

    def back(self, boxes: Sequence[Box]) -> list[Box]:
        order = sorted(range(len(self.perm)), key=self.perm.__getitem__)
        return [tuple(box[axis] for axis in order) for box in boxes]


@dataclass(frozen=True)
class Reorder:
    """Slices of one axis in a new order; with runs that leave something out, also a selection."""

    dim: int
    runs: tuple[Run, ...]
    before: Shape

    @property
    def after(self) -> Shape:
        size = sum(stop - start for start, stop in self.runs)
        return (*self.before[: self.dim], size, *self.before[self.dim + 1 :])

    def pieces(self) -> list[tuple[int, int, int]]:
        """``(position in the result, position in the source, length)`` of every run."""
        found, at = [], 0
        for start, stop in self.runs:
            found.append((at, start, stop - start))
            at += stop - start
        return found

    def apply(self, tensor: Tensor) -> Tensor:
        import torch

        return torch.cat([tensor.narrow(self.dim, start, stop - start) for start, stop in self.runs], self.dim)

    def back(self, boxes: Sequence[Box]) -> list[Box]:
        found = []
        for box in boxes:
            low, high = box[self.dim]
            for at, start, length in self.pieces():
                first, last = max(low, at), min(high, at + length)
                if first < last:
                    moved = (first - at + start, last - at + start)
                    found.append((*box[: self.dim], moved, *box[self.dim + 1 :]))
        return found


@dataclass(frozen=True)
class Cast:
    """A change of dtype that a rule asks for."""

    dtype: str
    before: Shape

    @property
    def after(self) -> Shape:
        return self.before

    def apply(self, tensor: Tensor) -> Tensor:
        import torch

        return tensor.to(getattr(torch, self.dtype))

    def back(self, boxes: Sequence[Box]) -> list[Box]:
        return list(boxes)


@dataclass(frozen=True)
class Fill:
    """One value in every element of a shape: a scale that all parts of a fused parameter share."""

    before: Shape
    after: Shape

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(()).expand(self.after)

    def back(self, boxes: Sequence[Box]) -> list[Box]:
        return [whole(self.before)] if boxes else []

    def undo(self, tensor: Tensor) -> Tensor:
        """The one value.

        Raises:
            RemapError: ``remap_op`` where the elements differ by now.
        """
        one = tensor.reshape(-1)[:1]
        if not bool((tensor == one).all()):
            raise RemapError(
                f"{tensor.numel()} elements that were filled with one value have {len(tensor.unique())} values now",
                code="remap_op",
                hint="export the elements by rules of their own",
            )
        return one.reshape(self.before)


@dataclass(frozen=True)
class Call:
    """A named transform of one tensor; every element of the result may depend on every element of the source."""

    name: str
    args: tuple[tuple[str, object], ...]
    before: Shape
    after: Shape

    def apply(self, tensor: Tensor) -> Tensor:
        from port_kit.remap.transforms import find_transform

        return find_transform(self.name).run({"": tensor}, dict(self.args), self.after)

    def back(self, boxes: Sequence[Box]) -> list[Box]:
        return [tuple((0, extent) for extent in self.before)] if boxes else []

    def undo(self, tensor: Tensor) -> Tensor:
        from port_kit.remap.transforms import find_transform

        return find_transform(self.name).undo(tensor, dict(self.args), {"": self.before})[""]


Step = Take | Reshape | Permute | Reorder | Cast | Fill | Call


def back(steps: Sequence[Step], boxes: Sequence[Box]) -> list[Box]:
    """Carry a region of the result back to the region of the source that it comes from."""
    region = list(boxes)
    for step in reversed(steps):
        region = step.back(region)
    return region


def gather(tensor: Tensor, steps: Sequence[Step]) -> Tensor:
    """Run the steps on a tensor; a view of it where no step moves or computes elements."""
    for step in steps:
        tensor = step.apply(tensor)
    return tensor


def copy_through(destination: Tensor, tensor: Tensor, steps: Sequence[Step]) -> None:
    """Write ``gather(tensor, steps)`` into ``destination`` with one copy of each element.

    A last reorder is copied run by run, and a cast is left to the copy, so that neither makes a temporary tensor.
    """
    if not steps:
        destination.copy_(tensor)
        return
    steps = list(steps)
    while steps and isinstance(steps[-1], Cast) and _same_rounding(steps[-1], destination):
        steps.pop()
    last = steps[-1] if steps else None
    if isinstance(last, Reorder):
        tensor = gather(tensor, steps[:-1])
        for at, start, length in last.pieces():
            destination.narrow(last.dim, at, length).copy_(tensor.narrow(last.dim, start, length))
        return
    destination.copy_(gather(tensor, steps))


def _same_rounding(cast: Cast, destination: Tensor) -> bool:
    """Whether copying does the cast's rounding: only where the destination has the very dtype of the cast."""
    return str(destination.dtype).removeprefix("torch.") == cast.dtype


def scatter(destination: Tensor, steps: Sequence[Step], value: Tensor) -> None:
    """Write ``value`` to the elements of ``destination`` that ``gather(destination, steps)`` would read.

    The way back of a load: exact for all steps but casts and transforms, which round as their inverse does.
    """
    if not steps:
        destination.copy_(value)
        return
    step, rest = steps[0], steps[1:]
    if isinstance(step, (Take, Permute)):
        scatter(step.apply(destination), rest, value)
    elif isinstance(step, Cast):
        scatter(destination, rest, value)
    elif isinstance(step, (Call, Fill)):
        result = destination.new_empty(step.after)
        scatter(result, rest, value)
        destination.copy_(step.undo(result))
    elif isinstance(step, Reshape):
        shaped = step.apply(destination)
        scatter(shaped, rest, value)
        if shaped.data_ptr() != destination.data_ptr():
            destination.copy_(shaped.reshape(step.before))
    else:
        moved = step.apply(destination)
        scatter(moved, rest, value)
        for at, start, length in step.pieces():
            destination.narrow(step.dim, start, length).copy_(moved.narrow(step.dim, at, length))
