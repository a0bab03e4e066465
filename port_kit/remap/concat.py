"""Parts of a join: the regions of a concatenation's parts, and the checks of transforms with several sources."""

from __future__ import annotations

from collections.abc import Sequence

from port_kit.errors import RemapError
from port_kit.regions import region_shape, with_span
from port_kit.remap.problems import Problem, remap_error
from port_kit.remap.resolve import CopyTask
from port_kit.remap.transforms import find_transform


def roles_of(task: CopyTask) -> tuple[str, ...]:
    """Return the parts that the task's join needs."""
    assert task.join is not None
    if task.join.name == "concat":
        return tuple(map(str, task.join.get("parts")))
    return find_transform(task.join.name).roles


def place_group(group: Sequence[CopyTask]) -> tuple[list[CopyTask], list[Problem]]:
    """Return the tasks of a join that can be executed, or its problems.

    The parts of a ``concat`` get regions of their own and no join. The parts of a transform stay together.
    """
    problems = _incomplete(group)
    if problems:
        return [], problems
    first = group[0]
    assert first.join is not None
    try:
        return (_place_parts if first.join.name == "concat" else _check_transform)(group), []
    except RemapError as error:
        sources = ", ".join(f"{task.source} {list(task.shape)} as {task.role}" for task in group)
        message = f"{error.message}; from {sources}"
        return [], [Problem(error.code, message, first.rule.label, first.source, target=first.target)]


def _incomplete(group: Sequence[CopyTask]) -> list[Problem]:
    """Return the parts of a join that are missing, given twice, or unknown."""
    first, needed = group[0], roles_of(group[0])
    have, problems = [task.role for task in group], []
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
        code, rule = "remap_incomplete_group", first.rule.label
        problems.append(Problem(code, message, rule, target=first.target, missing=missing))
    return problems


def _place_parts(group: Sequence[CopyTask]) -> list[CopyTask]:
    """Return the parts of a concatenation with the region of each; raises ``remap_shape`` if they do not fill it."""
    first, roles = group[0], roles_of(group[0])
    assert first.join is not None
    full = region_shape(first.region)
    axis = first.join.get("dim") % max(len(full), 1)
    at, stop = first.region[axis] if full else (0, -1)
    placed = []
    for task in sorted(group, key=lambda task: roles.index(task.role)):
        width = task.shape[axis] if axis < len(task.shape) else 0
        if task.shape != (*full[:axis], width, *full[axis + 1 :]):
            break
        placed.append(task._replace(region=with_span(first.region, axis, at, at + width), join=None))
        at += width
    if at != stop or len(placed) < len(group):
        raise remap_error(
            "remap_shape", f"{first.target} takes parts that fill {list(full)} along axis {axis} together"
        )
    return placed


def _check_transform(group: Sequence[CopyTask]) -> list[CopyTask]:
    """Return the parts of a transform; raises ``remap_shape`` if its result does not fit the target."""
    first = group[0]
    assert first.join is not None
    shapes = {task.role: task.shape for task in group}
    shape, full = find_transform(first.join.name).shape(shapes, dict(first.join.args)), region_shape(first.region)
    if tuple(shape) != full:
        message = f"{first.join.name} results in {list(shape)}; {first.target} takes {list(full)}"
        raise remap_error("remap_shape", message)
    return list(group)
