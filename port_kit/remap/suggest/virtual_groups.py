"""Virtual groups: fused projections and stacks of experts, on whichever side has the parts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from os.path import commonprefix

from port_kit.remap.suggest.alignment import shape_class
from port_kit.remap.suggest.module_groups import INDEX_SLOT, Index, ModuleGroup, Shape
from port_kit.remap.suggest.vocabulary import natural_key

#: Row orders of fused groups, by the roles of their members.
FUSED: tuple[tuple[str, ...], ...] = (("q", "k", "v"), ("k", "v"), ("q", "k"), ("q", "kv"), ("gate", "up"))
_ROLES = frozenset({"q", "k", "v", "gate", "up"})
_MOST_NUMBERED = 4
_NEAR = 2  # components from the innermost one within which a role is looked for


def virtual_groups(parts: Sequence[ModuleGroup], wholes: Iterable[ModuleGroup]) -> list[ModuleGroup]:
    """Groups of ``parts`` whose shape some group of the other side has, or whose rows it has in another shape.

    Args:
        parts: plain groups of the side that has the parts.
        wholes: plain groups of the other side.

    Returns:
        concat and stack groups, each of which fits at least one of ``wholes``.
    """
    wholes = list(wholes)
    wanted, rows = {shape_class(group) for group in wholes}, {_row_class(group) for group in wholes}
    concats = [*_concats(parts), *_numbered(parts)]
    found = [group for group in (*concats, *_with_extras(parts, concats)) if _row_class(group) in rows]
    found += [group for group in _concats(parts, axis=1) if shape_class(group) in wanted]
    stacks = (_stack(group, axis) for group in [*parts, *concats] for axis in range(len(group.instances[0])))
    return found + [stack for stack in stacks if stack is not None and _stack_wanted(stack, wanted)]


def weight_norm_groups(parts: Iterable[ModuleGroup], wholes: Iterable[ModuleGroup]) -> list[ModuleGroup]:
    """Modules with a weight norm (direction and magnitude) as modules with a plain weight, if the other side has such.

    The way back is not unique and is never proposed.
    """
    wanted = {shape_class(group) for group in wholes}
    found = [_weight_norm(group) for group in parts if {"weight_g", "weight_v"} <= set(group.roles)]
    return [group for group in found if shape_class(group) in wanted]


def _weight_norm(group: ModuleGroup) -> ModuleGroup:
    shapes = {role: row for role, row in group.shapes.items() if role not in ("weight_g", "weight_v")}
    shapes["weight"] = group.shapes["weight_v"]
    return ModuleGroup(group.parts, {}, shapes, group.order, "weight_norm", (group,), tokens=group.tokens)


def _row_class(group: ModuleGroup) -> tuple[int, tuple[tuple[str, Shape], ...]]:
    """Return what joining along the rows keeps, whatever shape each row has: rows and elements, by role."""
    first = group.instances[0]
    shapes = ((role, group.shapes[role][first]) for role in group.roles)
    return len(group.instances), tuple((role, (*shape[:1], math.prod(shape[1:]))) for role, shape in shapes)


def _stack_wanted(stack: ModuleGroup, wanted: set[tuple[int, tuple[tuple[str, Shape], ...]]]) -> bool:
    count, roles = shape_class(stack)
    transposed = tuple((role, (*shape[:1], *reversed(shape[1:]))) for role, shape in roles)
    return (count, roles) in wanted or (len(roles[0][1]) == 3 and (count, transposed) in wanted)


def roles_of(group: ModuleGroup) -> list[str]:
    """The fused-group roles that a group's innermost words name."""
    return [word for word, distance in group.tokens if word in _ROLES and distance < _NEAR]


def role_of(group: ModuleGroup) -> str:
    """The one role that a group plays in a fused group, ``kv`` if keys and values are one already; else empty."""
    roles = set(roles_of(group))
    return "kv" if roles == {"k", "v"} else roles.pop() if len(roles) == 1 else ""


def _concats(parts: Sequence[ModuleGroup], axis: int = 0) -> list[ModuleGroup]:
    families: dict[object, dict[str, ModuleGroup]] = defaultdict(dict)
    for group in parts:
        role = role_of(group)
        if not role:
            continue
        rest = frozenset(
            (word, distance)
            for word, distance in group.tokens
            if not (word in _ROLES and distance < _NEAR) and not word.startswith("#")
        )
        families[(group.parts[:-1], rest, group.instances, group.roles)][role] = group
        families[(group.parts[:-2], rest, group.instances, group.roles)].setdefault(role, group)
    found = (
        concat([members[role] for role in roles], axis)
        for members in families.values()
        for roles in FUSED
        if set(roles) <= set(members) and _fit_along([members[role] for role in roles], axis)
    )
    return list({group.members: group for group in found}.values())


def _numbered(parts: Sequence[ModuleGroup]) -> list[ModuleGroup]:
    """Siblings that only a number tells apart (``norm1.linear``, ``norm2.linear``), in the order of their numbers."""
    families: dict[object, list[ModuleGroup]] = defaultdict(list)
    for group in parts:
        rest = tuple(token for token in group.tokens if not token[0].startswith("#"))
        if len(rest) != len(group.tokens):
            families[(_block_of(group), len(group.parts), rest, group.instances, group.roles)].append(group)
    return [
        concat(sorted(members, key=lambda group: natural_key(str(group))))
        for members in families.values()
        if 2 <= len(members) <= _MOST_NUMBERED and _same_columns(members)
    ]


def _with_extras(parts: Sequence[ModuleGroup], concats: Sequence[ModuleGroup]) -> list[ModuleGroup]:
    """Fused attention that carries the feed-forward's first projection too (parallel blocks)."""
    found: list[ModuleGroup] = []
    for group in concats:
        if len(group.members) != 3 or not set(roles_of(group.members[0])) & {"q"}:
            continue
        block = _block_of(group.members[0])
        near = [
            part
            for part in parts
            if part not in group.members
            and part.instances == group.instances
            and part.roles == group.roles
            and part.parts[: len(block)] == block
            and _same_columns([group.members[0], part])
        ]
        for count in (1, 2):
            for extras in combinations(near, count):
                found.append(concat([*group.members, *sorted(extras, key=lambda part: part.order)]))
    return found


def _block_of(group: ModuleGroup) -> tuple[str, ...]:
    """The innermost repeated container of a group."""
    slots = [position for position, part in enumerate(group.parts) if INDEX_SLOT in part]
    return group.parts[: slots[-1] + 1] if slots else group.parts[:-2]


def _same_columns(groups: Sequence[ModuleGroup]) -> bool:
    """Return True if the rows of all tensors have as many elements: one fused tensor can hold them."""
    return all(
        math.prod(group.shapes[role][index][1:]) == math.prod(groups[0].shapes[role][index][1:])
        and group.shapes[role][index] != ()
        for group in groups
        for role in group.roles
        for index in group.instances
    )


def _fit_along(groups: Sequence[ModuleGroup], axis: int) -> bool:
    """Return True if tensors can be joined along an axis; along the second one only matrices that have no other way."""
    if not axis:
        return _same_columns(groups)
    return all(
        len(group.shapes[role][index]) == 1
        or len(group.shapes[role][index]) == 2
        and group.shapes[role][index][0] == groups[0].shapes[role][index][0]
        for group in groups
        for role in group.roles
        for index in group.instances
    ) and any(len(shape) == 2 for row in groups[0].shapes.values() for shape in row.values())


def concat(members: Sequence[ModuleGroup], axis: int = 0) -> ModuleGroup:
    """The group whose rows (with axis 1: columns) are the members' one after another."""
    shapes = {
        role: {index: _joined([group.shapes[role][index] for group in members], axis) for index in row}
        for role, row in members[0].shapes.items()
    }
    shared = commonprefix([group.parts[:-1] for group in members])
    name = "+".join(".".join(group.parts[len(shared) :]) for group in members)
    tokens = _joined_tokens(members)
    order = min(group.order for group in members)
    return ModuleGroup((*shared, name), {}, shapes, order, "concat", tuple(members), axis, tokens)


def _joined(shapes: Sequence[Shape], axis: int) -> Shape:
    if axis:
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
    return (sum(shape[0] for shape in shapes), *min((shape[1:] for shape in shapes), key=len))


def _stack(group: ModuleGroup, axis: int) -> ModuleGroup | None:
    """The group with one of its indices turned into a leading dimension, or None if its shapes do not allow it."""
    rows: dict[Index, list[int]] = defaultdict(list)
    for index in group.instances:
        rows[index[:axis] + index[axis + 1 :]].append(index[axis])
    counts = {tuple(values) for values in rows.values()}
    values = next(iter(counts))
    if len(counts) != 1 or values != tuple(range(len(values))) or len(values) < 2:
        return None
    shapes = {
        role: {
            outer: (len(values), *row[outer[:axis] + (0,) + outer[axis:]])
            for outer in rows
            if len({row[outer[:axis] + (value,) + outer[axis:]] for value in values}) == 1
        }
        for role, row in group.shapes.items()
    }
    if any(len(row) != len(rows) for row in shapes.values()):
        return None
    slots = [position for position, part in enumerate(group.parts) if INDEX_SLOT in part]
    parts = tuple(
        part.replace(INDEX_SLOT, "") if position == slots[axis] else part
        for position, part in enumerate(group.parts)
        if position != slots[axis] or part != INDEX_SLOT
    )
    return ModuleGroup(parts, {}, shapes, group.order, "stack", (group,), axis, group.tokens)


def _joined_tokens(members: Sequence[ModuleGroup]) -> tuple[tuple[str, int], ...]:
    nearest: dict[str, int] = {}
    for group in members:
        for word, distance in group.tokens:
            if not word.startswith("#"):
                nearest[word] = min(distance, nearest.get(word, distance))
    return tuple(nearest.items())
