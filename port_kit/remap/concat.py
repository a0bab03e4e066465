"""Parts of a join: the regions of a concatenation's parts, and the checks of transforms with several sources."""

from __future__ import annotations

from collections.abc import Sequence

from port_kit.errors import RemapError
from port_kit.escape import quoted
from port_kit.regions import region_shape, with_span
from port_kit.remap.ops import Op
from port_kit.remap.problems import Problem, remap_error
from port_kit.remap.resolve import CopyTask
from port_kit.remap.transforms import find_transform


def roles_of(join: Op) -> tuple[str, ...]:
    """Return the parts that a join needs."""
    return tuple(map(str, join.get("parts"))) if join.name == "concat" else find_transform(join.name).roles


def place_group(group: Sequence[CopyTask]) -> tuple[list[CopyTask], list[Problem]]:
    """Return the tasks of a join that can be executed, or its problems.

    The parts of a ``concat`` get regions of their own and no join. The parts of a transform stay together.
    """
    first, join = group[0], group[0].join
    assert join is not None
    problems = _incomplete(group, roles_of(join))
    if problems:
        return [], problems
    try:
        return (_place_parts if join.name == "concat" else _check_transform)(group, join), []
    except RemapError as error:
        sources = ", ".join(f"{task.source} {list(task.shape)} as {task.role}" for task in group)
        message = f"{error.message}; from {sources}"
        return [], [Problem(error.code, message, first.rule.label, first.source, target=first.target)]


def _incomplete(group: Sequence[CopyTask], needed: Sequence[str]) -> list[Problem]:
    """Return the parts of a join that are missing, given twice, or unknown."""
    first, have, problems = group[0], [task.role for task in group], []
    for task in group:
        if task.role not in needed:
            message = f"{task.source} is part {quoted(task.role)} of {task.target}; expected one of {', '.join(needed)}"
            problems.append(Problem("remap_slot", message, task.rule.label, task.source, target=task.target))
        elif have.count(task.role) > 1:
            message = f"part {quoted(task.role)} of {task.target} has more than one source: {task.source}"
            problems.append(Problem("remap_collision", message, task.rule.label, task.source, target=task.target))
    missing = tuple(role for role in needed if role not in have)
    if missing:
        message = f"{first.target} got {', '.join(have)}; missing: {', '.join(missing)}"
        code, rule = "remap_incomplete_group", first.rule.label
        problems.append(Problem(code, message, rule, target=first.target, missing=missing))
    return problems


def _place_parts(group: Sequence[CopyTask], join: Op) -> list[CopyTask]:
    """Return the parts of a concatenation with the region of each; raises ``remap_shape`` if they do not fill it."""
    first, roles = group[0], roles_of(join)
    full = region_shape(first.region)
    axis = join.get("dim") % max(len(full), 1)
    at, stop = first.region[axis] if full else (0, -1)
    placed = []
    for task in sorted(group, key=lambda task: roles.index(task.role)):
        width = task.shape[axis] if axis < len(task.shape) else 0
        if task.shape != (*full[:axis], width, *full[axis + 1 :]):
            break
        placed.append(task._replace(region=with_span(first.region, axis, at, at + width), join=None))
        at += width
    if at != stop or len(placed) < len(group):
        message = f"{first.target} takes parts that fill {list(full)} along axis {axis} together"
        raise remap_error("remap_shape", message)
    return placed


def _check_transform(group: Sequence[CopyTask], join: Op) -> list[CopyTask]:
    """Return the parts of a transform; raises ``remap_shape`` if its result does not fit the target."""
    shapes, full = {task.role: task.shape for task in group}, region_shape(group[0].region)
    shape = find_transform(join.name).shape(shapes, dict(join.args))
    if tuple(shape) != full:
        message = f"{join.name} results in {list(shape)}; {group[0].target} takes {list(full)}"
        raise remap_error("remap_shape", message)
    return list(group)
