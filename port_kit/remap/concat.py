"""Parts of a join: the regions of a concatenation's parts, and the checks of transforms with several sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from port_kit.errors import RemapError
from port_kit.regions import Shape, region_shape, with_span
from port_kit.remap.problems import Problem, problem_from
from port_kit.remap.resolve import CopyTask
from port_kit.remap.transforms import find_transform


def roles_of(task: CopyTask) -> tuple[str, ...]:
    """Return the parts that the task's join needs."""
    assert task.join is not None
    if task.join.name == "concat":
        return tuple(map(str, task.join.get("parts")))
    return find_transform(task.join.name).roles


def incomplete(group: Sequence[CopyTask]) -> list[Problem]:
    """Return what a join lacks, has twice, or does not know."""
    first, needed = group[0], roles_of(group[0])
    have = [task.role for task in group]
    problems = []
    for task in group:
        if task.role not in needed:
            message = f"{task.source} is part {task.role!r} of {task.target}; expected one of {', '.join(needed)}"
            problems.append(Problem("remap_slot", message, task.rule.label, task.source, target=task.target))
        elif have.count(task.role) > 1:
            message = f"part {task.role!r} of {task.target} has more than one source: {task.source}"
            problems.append(Problem("remap_collision", message, task.rule.label, task.source, target=task.target))
    missing = tuple(role for role in needed if role not in have)
    if missing:
        message = f"{first.target} got {', '.join(have)}; missing: {', '.join(missing)}"
        problems.append(
            Problem("remap_incomplete_group", message, first.rule.label, target=first.target, missing=missing)
        )
    return problems


def place_group(group: Sequence[CopyTask]) -> tuple[list[CopyTask], list[Problem]]:
    """Return the tasks of a join that can be executed, or its problems.

    The parts of a ``concat`` get regions of their own and no join. The parts of a transform stay together.
    """
    problems = incomplete(group)
    if problems:
        return [], problems
    first = group[0]
    assert first.join is not None
    try:
        if first.join.name == "concat":
            return _placed(sorted(group, key=lambda task: roles_of(first).index(task.role))), []
        problems = _check_transform(group)
        return ([] if problems else list(group)), problems
    except RemapError as error:
        found = problem_from(error, rule=first.rule.label, source=first.source, target=first.target)
        sources = ", ".join(f"{task.source} {list(task.shape)}" for task in group)
        return [], [replace(found, message=f"{found.message}; from {sources}")]


def _placed(ordered: Sequence[CopyTask]) -> list[CopyTask]:
    first = ordered[0]
    assert first.join is not None
    full = region_shape(first.region)
    axis = first.join.get("dim") % max(len(full), 1)
    if not full:
        raise _misfit(first, full, axis)
    at, placed = first.region[axis][0], []
    for task in ordered:
        width = task.shape[axis] if axis < len(task.shape) else -1
        if task.shape != (*full[:axis], width, *full[axis + 1 :]) or at + width > first.region[axis][1]:
            raise _misfit(task, full, axis)
        placed.append(task._replace(region=with_span(first.region, axis, at, at + width), join=None))
        at += width
    if at != first.region[axis][1]:
        raise _misfit(ordered[-1], full, axis)
    return placed


def _misfit(task: CopyTask, full: Shape, axis: int) -> RemapError:
    return RemapError(
        f"part {task.role!r} of {task.target} has shape {list(task.shape)}; "
        f"expected parts that fill {list(full)} along axis {axis} together",
        code="remap_shape",
        hint="compare the shapes of the parts with the target's",
    )


def _check_transform(group: Sequence[CopyTask]) -> list[Problem]:
    first = group[0]
    assert first.join is not None
    shapes = {task.role: task.shape for task in group}
    shape = tuple(find_transform(first.join.name).shape(shapes, dict(first.join.args)))
    if shape == region_shape(first.region):
        return []
    message = (
        f"{first.join.name} of {', '.join(task.source for task in group)} results in {list(shape)}; "
        f"{first.target} takes {list(region_shape(first.region))}"
    )
    return [Problem("remap_shape", message, first.rule.label, first.source, target=first.target)]
