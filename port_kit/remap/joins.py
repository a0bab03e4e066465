"""Parts that make sense only together: a concatenation without given sizes, and transforms of several sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from port_kit.errors import RemapError
from port_kit.remap.boxes import Shape, extents
from port_kit.remap.lower import Write
from port_kit.remap.ops import Scope
from port_kit.remap.problems import Problem, problem_from
from port_kit.remap.transforms import find_transform


def parts_of(write: Write) -> tuple[str, ...]:
    """The parts that the write's join needs."""
    assert write.join is not None
    if write.join.name == "concat":
        return tuple(map(str, write.join.get("parts")))
    return find_transform(write.join.name).roles


def incomplete(parts: Sequence[Write]) -> list[Problem]:
    """What a join lacks, has twice, or does not know."""
    first = parts[0]
    needed = parts_of(first)
    have = [write.part for write in parts]
    problems = []
    for write in parts:
        if write.part not in needed:
            message = (
                f"{write.source} is part {write.part!r} of {write.target}, which has the parts {', '.join(needed)}"
            )
            problems.append(Problem("remap_slot", message, write.rule.label, write.source, target=write.target))
        elif have.count(write.part) > 1:
            message = f"part {write.part!r} of {write.target} comes from more than one source: {write.source}"
            problems.append(Problem("remap_collision", message, write.rule.label, write.source, target=write.target))
    missing = [part for part in needed if part not in have]
    if missing:
        message = f"{first.target} got {', '.join(have)}; missing: {', '.join(missing)}"
        problems.append(
            Problem("remap_incomplete_group", message, first.rule.label, target=first.target, missing=tuple(missing))
        )
    return problems


def place_parts(parts: Sequence[Write], sizes: dict[str, int]) -> tuple[list[Write], list[Problem]]:
    """Work out where the parts of one complete ``concat`` stand.

    Returns:
        The writes with their own regions and without a join, or the problems.
    """
    problems = incomplete(parts)
    if problems:
        return [], problems
    first = parts[0]
    order = parts_of(first)
    ordered = sorted(parts, key=lambda write: order.index(write.part))
    try:
        return _placed(ordered, sizes), []
    except RemapError as error:
        return [], [problem_from(error, rule=first.rule.label, source=first.source, target=first.target)]


def _placed(ordered: Sequence[Write], sizes: dict[str, int]) -> list[Write]:
    first = ordered[0]
    assert first.join is not None
    whole = extents(first.region)
    axis = first.join.get("dim") % max(len(whole), 1)
    scope = Scope(sizes, first.rule.label, first.target, None, first.shape)
    given = first.join.get("sizes")
    if given is None:
        widths = [write.shape[axis] if axis < len(write.shape) else -1 for write in ordered]
    else:
        widths = [scope.size(size) for size in given]
    start, at = first.region[axis][0], 0
    placed = []
    for write, width in zip(ordered, widths, strict=True):
        shape = (*whole[:axis], width, *whole[axis + 1 :])
        if write.shape != shape or at + width > whole[axis]:
            raise _misfit(write, whole, axis)
        span = (start + at, start + at + width)
        placed.append(write._replace(region=(*first.region[:axis], span, *first.region[axis + 1 :]), join=None))
        at += width
    if at != whole[axis]:
        raise _misfit(ordered[-1], whole, axis)
    return placed


def _misfit(write: Write, whole: Shape, axis: int) -> RemapError:
    return RemapError(
        f"part {write.part!r} of {write.target} from {write.source} has shape {list(write.shape)}; "
        f"all parts together must fill {list(whole)} along axis {axis}",
        code="remap_shape",
        hint="compare the parts with the target",
    )


def check_transform(parts: Sequence[Write]) -> list[Problem]:
    """Check a transform of several sources: all roles there, and the declared shape is the target's."""
    problems = incomplete(parts)
    if problems:
        return problems
    first = parts[0]
    assert first.join is not None
    shapes = {write.part: write.shape for write in parts}
    facts: dict[str, Any] = {"rule": first.rule.label, "source": first.source, "target": first.target}
    try:
        shape = tuple(find_transform(first.join.name).shape(shapes, dict(first.join.args)))
    except RemapError as error:
        sources = ", ".join(f"{write.source} {list(write.shape)}" for write in parts)
        return [replace(found := problem_from(error, **facts), message=f"{found.message}; from {sources}")]
    if shape != extents(first.region):
        message = (
            f"{first.join.name} of {', '.join(write.source for write in parts)} gives {list(shape)}; "
            f"{first.target} takes {list(extents(first.region))}"
        )
        return [Problem("remap_shape", message, **facts)]
    return []


def known_places(write: Write, sizes: dict[str, int]) -> list[Write]:
    """Place the parts of a ``concat`` without waiting for the others of one, where its op gives sizes.

    A part of the mean width proves nothing: the others may be wider and narrower. Two parts are the exception.

    Returns:
        The part and what the others will be like, each in its region; nothing where they have to be known first.
    """
    assert write.join is not None and write.join.name == "concat"
    parts, whole = parts_of(write), extents(write.region)
    if write.part not in parts or len(write.shape) != len(whole):
        return []
    axis = write.join.get("dim") % len(whole)
    if write.join.get("sizes") is None:
        if len(parts) > 2:
            return []
        rest = whole[axis] - write.shape[axis]
        widths = [write.shape[axis] if part == write.part else rest for part in parts]
    else:
        scope = Scope(sizes, write.rule.label, write.target, None, write.shape)
        widths = [scope.size(size) for size in write.join.get("sizes")]
    stand_ins = [
        write._replace(part=part, shape=(*write.shape[:axis], width, *write.shape[axis + 1 :]))
        for part, width in zip(parts, widths, strict=True)
        if part != write.part
    ]
    return place_parts([write, *stand_ins], sizes)[0]
