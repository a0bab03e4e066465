"""Regions of tensors as boxes: which elements a write takes and where it puts them, without touching an element.

A box is one ``(start, stop)`` pair an axis. A region is a list of disjoint boxes. The only operation that does not keep
boxes is a reshape: there a region becomes intervals of the row-major order and boxes again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from port_kit.errors import RemapError

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
Interval = tuple[int, int]

#: Most intervals that one region is expanded to; beyond, a rule reshapes across the grain of what it takes.
MAX_INTERVALS = 1 << 20


@lru_cache(maxsize=8192)
def whole(shape: Shape) -> Box:
    """The box of all elements."""
    return tuple((0, extent) for extent in shape)


def extents(box: Box) -> Shape:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


@lru_cache(maxsize=8192)
def slices(box: Box, shape: Shape) -> tuple[slice, ...] | None:
    """A box as an index of a tensor of this shape; None where it is all of it."""
    return None if box == whole(shape) else tuple(slice(start, stop) for start, stop in box)


def volume(box: Box) -> int:
    """Number of elements in a box."""
    return math.prod(stop - start for start, stop in box)


def intersection(one: Box, other: Box) -> Box | None:
    """The common elements of two boxes, or None."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def tiles(shape: Shape, boxes: Sequence[Box]) -> bool:
    """Whether the boxes hold every element of a shape, each once."""
    if len(boxes) == 1:
        return boxes[0] == whole(shape)
    return first_overlap(boxes) is None and gaps(boxes, shape) == 0


def first_overlap(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """Return the positions of two boxes that share an element, or None where all are disjoint.

    Boxes are swept along the axis on which most of them differ, so hundreds of experts cost no quadratic time.
    """
    if len(boxes) < 2 or not boxes[0]:
        return (0, 1) if len(boxes) > 1 else None
    axis = max(range(len(boxes[0])), key=lambda at: len({box[at] for box in boxes}))
    order = sorted(range(len(boxes)), key=lambda at: boxes[at][axis])
    active: list[int] = []
    for at in order:
        start = boxes[at][axis][0]
        active = [other for other in active if boxes[other][axis][1] > start]
        for other in active:
            if intersection(boxes[at], boxes[other]):
                return (other, at)
        active.append(at)
    return None


def to_intervals(box: Box, shape: Shape) -> list[Interval]:
    """The row-major intervals of a box, merged where they touch."""
    inner = len(shape)
    while inner and box[inner - 1] == (0, shape[inner - 1]):
        inner -= 1
    if not inner:
        return [(0, math.prod(shape))]
    # axes from `inner` on are whole; axis inner-1 gives a contiguous run; the axes before are walked
    unit = math.prod(shape[inner:])
    count = math.prod(stop - start for start, stop in box[: inner - 1])
    if count > MAX_INTERVALS:
        raise RemapError(
            f"a part {list(box)} of shape {list(shape)} falls into {count} pieces when it is reshaped",
            code="remap_op",
            hint="take the part after the reshape, or reshape less",
        )
    start, stop = box[inner - 1]
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    bases = [0]
    for axis in range(inner - 1):
        bases = [base + index * strides[axis] for base in bases for index in range(*box[axis])]
    return merged((base + start * unit, base + stop * unit) for base in bases)


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Sort intervals and join those that touch."""
    result: list[Interval] = []
    for start, stop in sorted(intervals):
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return result


def to_boxes(intervals: Iterable[Interval], shape: Shape) -> list[Box]:
    """The boxes of row-major intervals in a shape."""
    return [box for start, stop in intervals if start < stop for box in _interval_boxes(start, stop, shape)]


def _interval_boxes(start: int, stop: int, shape: Shape) -> Iterator[Box]:
    """Split one interval into boxes: an incomplete first row, whole rows, an incomplete last row."""
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        if stop - start == row:
            yield ((first, first + 1), *whole(shape[1:]))
            return
        for box in _interval_boxes(start - first * row, stop - first * row, shape[1:]):
            yield ((first, first + 1), *box)
        return
    if start != first * row:
        yield from _interval_boxes(start, (first + 1) * row, shape)
        first += 1
    whole_rows = stop // row
    if whole_rows > first:
        yield ((first, whole_rows), *whole(shape[1:]))
    if stop > whole_rows * row:
        yield from _interval_boxes(whole_rows * row, stop, shape)


def reshaped(boxes: Iterable[Box], before: Shape, after: Shape) -> list[Box]:
    """Carry a region from one shape into another of the same number of elements."""
    boxes = list(boxes)
    if boxes == [whole(before)]:
        return [whole(after)]
    if [extent for extent in before if extent != 1] == [extent for extent in after if extent != 1]:
        return [_other_units(box, before, after) for box in boxes]
    intervals = merged(interval for box in boxes for interval in to_intervals(box, before))
    return to_boxes(intervals, after)


def gaps(boxes: Sequence[Box], shape: Shape) -> int:
    """Number of elements of a shape that lie in none of some disjoint boxes."""
    return math.prod(shape) - sum(volume(box) for box in boxes)


def _other_units(box: Box, before: Shape, after: Shape) -> Box:
    """Carry a box into a shape that differs in axes of extent 1 alone: it stays one box."""
    spans = iter([span for span, extent in zip(box, before, strict=True) if extent != 1])
    return tuple((0, 1) if extent == 1 else next(spans) for extent in after)
