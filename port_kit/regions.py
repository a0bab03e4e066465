"""Regions of tensors.

A region is one ``(start, stop)`` pair per axis. All operations map a region to a region, except reshapes: they convert
a region to intervals in row-major order, and the intervals to regions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from port_kit.errors import RemapError

Shape = tuple[int, ...]
Region = tuple[tuple[int, int], ...]
Interval = tuple[int, int]

#: Largest number of intervals that one region is expanded to.
MAX_INTERVALS = 1 << 20


@lru_cache(maxsize=8192)
def full_region(shape: Shape) -> Region:
    """Return the region of all elements."""
    return tuple((0, extent) for extent in shape)


def region_shape(region: Region) -> Shape:
    """Return the extents of a region."""
    return tuple(stop - start for start, stop in region)


def region_numel(region: Region) -> int:
    """Return the number of elements in a region."""
    return math.prod(stop - start for start, stop in region)


def region_index(region: Region) -> tuple[slice, ...]:
    """Return the region as an index of a tensor."""
    return tuple(slice(start, stop) for start, stop in region)


def intersection(one: Region, other: Region) -> Region | None:
    """Return the common elements of two regions, or None."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def relative_to(region: Region, base: Region) -> Region:
    """Return a region with the start of ``base`` as its origin."""
    return tuple((a - low, b - low) for (a, b), (low, _) in zip(region, base, strict=True))


def shifted(region: Region, base: Region) -> Region:
    """Return a region inside ``base`` in the coordinates of the tensor that ``base`` belongs to."""
    return tuple((a + low, b + low) for (a, b), (low, _) in zip(region, base, strict=True))


def with_span(region: Region, axis: int, start: int, stop: int) -> Region:
    """Return the region with another span on one axis."""
    return (*region[:axis], (start, stop), *region[axis + 1 :])


def region_text(region: Region) -> str:
    """Return the region as Python writes an index: ``[0:4, 2:3]``."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in region) + "]"


def uncovered_numel(regions: Sequence[Region], shape: Shape) -> int:
    """Return the number of elements of a shape that are in none of some disjoint regions."""
    return math.prod(shape) - sum(map(region_numel, regions))


def first_overlap(regions: Sequence[Region]) -> tuple[int, int] | None:
    """Return the positions of two regions that share an element, or None if all are disjoint.

    Regions are swept along the axis on which most of them differ, which avoids quadratic time for hundreds of experts.
    """
    if len(regions) < 2 or not regions[0]:
        return (0, 1) if len(regions) > 1 else None
    axis = max(range(len(regions[0])), key=lambda at: len({region[at] for region in regions}))
    order = sorted(range(len(regions)), key=lambda at: regions[at][axis])
    active: list[int] = []
    for at in order:
        start = regions[at][axis][0]
        active = [other for other in active if regions[other][axis][1] > start]
        for other in active:
            if intersection(regions[at], regions[other]):
                return (other, at)
        active.append(at)
    return None


def reshaped(regions: Iterable[Region], before: Shape, after: Shape) -> list[Region]:
    """Return some regions of one shape as regions of another shape with the same number of elements."""
    regions = list(regions)
    if regions == [full_region(before)]:
        return [full_region(after)]
    if [extent for extent in before if extent != 1] == [extent for extent in after if extent != 1]:
        return [_with_other_units(region, before, after) for region in regions]
    intervals = _merged(interval for region in regions for interval in to_intervals(region, before))
    return to_regions(intervals, after)


def to_intervals(region: Region, shape: Shape) -> list[Interval]:
    """Return the row-major intervals of a region, joined if they touch.

    Raises:
        RemapError: ``remap_op`` if there are more than :data:`MAX_INTERVALS`.
    """
    inner = len(shape)
    while inner and region[inner - 1] == (0, shape[inner - 1]):
        inner -= 1
    if not inner:
        return [(0, math.prod(shape))]
    # Axes from `inner` on are complete, so axis inner-1 gives one contiguous interval per index of the axes before.
    unit = math.prod(shape[inner:])
    count = math.prod(stop - start for start, stop in region[: inner - 1])
    if count > MAX_INTERVALS:
        raise RemapError(
            f"region {region_text(region)} of shape {list(shape)} becomes {count} intervals in a reshape",
            code="remap_op",
            hint="slice after the reshape",
        )
    start, stop = region[inner - 1]
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    bases = [0]
    for axis in range(inner - 1):
        bases = [base + index * strides[axis] for base in bases for index in range(*region[axis])]
    return _merged((base + start * unit, base + stop * unit) for base in bases)


def to_regions(intervals: Iterable[Interval], shape: Shape) -> list[Region]:
    """Return row-major intervals as regions of a shape."""
    return [region for start, stop in intervals if start < stop for region in _interval_regions(start, stop, shape)]


def _interval_regions(start: int, stop: int, shape: Shape) -> Iterator[Region]:
    """Split one interval: an incomplete first row, complete rows, an incomplete last row."""
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last and stop - start != row:
        for region in _interval_regions(start - first * row, stop - first * row, shape[1:]):
            yield ((first, first + 1), *region)
        return
    if start != first * row:
        yield from _interval_regions(start, (first + 1) * row, shape)
        first += 1
    complete = stop // row
    if complete > first:
        yield ((first, complete), *full_region(shape[1:]))
    if stop > complete * row:
        yield from _interval_regions(complete * row, stop, shape)


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    result: list[Interval] = []
    for start, stop in sorted(intervals):
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return result


def _with_other_units(region: Region, before: Shape, after: Shape) -> Region:
    """Return a region of a shape that differs in axes of extent 1 only; it stays one region."""
    spans = iter([span for span, extent in zip(region, before, strict=True) if extent != 1])
    return tuple((0, 1) if extent == 1 else next(spans) for extent in after)
