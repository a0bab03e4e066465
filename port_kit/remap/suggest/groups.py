"""Virtual units: fused projections and stacks of experts, on whichever side has the parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations

from port_kit.remap.suggest.shapes import squeezed
from port_kit.remap.suggest.units import HOLE, Index, Shape, Unit
from port_kit.remap.suggest.vocabulary import natural_key

#: Row orders of fused groups, by the roles of their members.
FUSED: tuple[tuple[str, ...], ...] = (("q", "k", "v"), ("k", "v"), ("q", "k"), ("q", "kv"), ("gate", "up"))
_ROLES = frozenset({"q", "k", "v", "gate", "up"})
_MOST_NUMBERED = 4
_NEAR = 2  # components from the innermost one within which a role is looked for


def virtual_units(parts: Sequence[Unit], wholes: Iterable[Unit]) -> list[Unit]:
    """Groups of ``parts`` whose shape some unit of the other side has.

    Args:
        parts: plain units of the side that has the parts.
        wholes: plain units of the other side.

    Returns:
        concat and stack units, each of which fits at least one of ``wholes``.
    """
    wanted = {_fingerprint(unit) for unit in wholes}
    concats = [*_concats(parts), *_numbered(parts)]
    found = [unit for unit in concats if _fingerprint(unit) in wanted]
    found += [unit for unit in _concats(parts, axis=1) if _fingerprint(unit) in wanted]
    found += [unit for unit in _with_extras(parts, concats) if _fingerprint(unit) in wanted]
    for unit in [*parts, *concats]:
        found += [stack for stack in _stacks(unit) if _stack_wanted(stack, wanted)]
    return found


def folded_units(parts: Iterable[Unit], wholes: Iterable[Unit]) -> list[Unit]:
    """Modules with a weight norm (direction and magnitude) as modules with a plain weight, where the other side has
    such a one; the way back is not unique and is never proposed.
    """
    wanted = {_fingerprint(unit) for unit in wholes}
    found = [_fold(unit) for unit in parts if {"weight_g", "weight_v"} <= set(unit.roles)]
    return [unit for unit in found if _fingerprint(unit) in wanted]


def _fold(unit: Unit) -> Unit:
    shapes = {role: row for role, row in unit.shapes.items() if role not in ("weight_g", "weight_v")}
    shapes["weight"] = unit.shapes["weight_v"]
    return Unit(unit.parts, {}, shapes, unit.order, "fold", (unit,), tokens=unit.tokens)


def _fingerprint(unit: Unit) -> tuple[int, tuple[tuple[str, Shape], ...]]:
    first = unit.instances[0]
    return len(unit.instances), tuple((role, squeezed(unit.shapes[role][first])) for role in unit.roles)


def _stack_wanted(stack: Unit, wanted: set[tuple[int, tuple[tuple[str, Shape], ...]]]) -> bool:
    count, roles = _fingerprint(stack)
    turned = tuple((role, (*shape[:1], *reversed(shape[1:]))) for role, shape in roles)
    return (count, roles) in wanted or (len(roles[0][1]) == 3 and (count, turned) in wanted)


def roles_of(unit: Unit) -> list[str]:
    """The fused-group roles that a unit's innermost words name."""
    return [word for word, distance in unit.tokens if word in _ROLES and distance < _NEAR]


def role_of(unit: Unit) -> str:
    """The one role that a unit plays in a fused group, ``kv`` where keys and values are one already; else empty."""
    roles = set(roles_of(unit))
    return "kv" if roles == {"k", "v"} else roles.pop() if len(roles) == 1 else ""


def _concats(parts: Sequence[Unit], axis: int = 0) -> list[Unit]:
    families: dict[object, dict[str, Unit]] = defaultdict(dict)
    for unit in parts:
        role = role_of(unit)
        if not role:
            continue
        rest = frozenset(
            (word, distance)
            for word, distance in unit.tokens
            if not (word in _ROLES and distance < _NEAR) and not word.startswith("#")
        )
        families[(unit.parts[:-1], rest, unit.instances, unit.roles)][role] = unit
        families[(unit.parts[:-2], rest, unit.instances, unit.roles)].setdefault(role, unit)
    return _distinct(
        concat([members[role] for role in roles], axis)
        for members in families.values()
        for roles in FUSED
        if set(roles) <= set(members) and _fit_along([members[role] for role in roles], axis)
    )


def _numbered(parts: Sequence[Unit]) -> list[Unit]:
    """Siblings that only a number tells apart (``norm1.linear``, ``norm2.linear``), in the order of their numbers."""
    families: dict[object, list[Unit]] = defaultdict(list)
    for unit in parts:
        rest = tuple(token for token in unit.tokens if not token[0].startswith("#"))
        if len(rest) != len(unit.tokens):
            families[(_block_of(unit), len(unit.parts), rest, unit.instances, unit.roles)].append(unit)
    return [
        concat(sorted(members, key=lambda unit: natural_key(str(unit))))
        for members in families.values()
        if 2 <= len(members) <= _MOST_NUMBERED and _same_columns(members)
    ]


def _with_extras(parts: Sequence[Unit], concats: Sequence[Unit]) -> list[Unit]:
    """Fused attention that carries the feed-forward's first projection too (parallel blocks)."""
    found: list[Unit] = []
    for group in concats:
        if len(group.members) != 3 or not set(roles_of(group.members[0])) & {"q"}:
            continue
        block = _block_of(group.members[0])
        near = [
            unit
            for unit in parts
            if unit not in group.members
            and unit.instances == group.instances
            and unit.roles == group.roles
            and unit.parts[: len(block)] == block
            and _same_columns([group.members[0], unit])
        ]
        for count in (1, 2):
            for extras in combinations(near, count):
                found.append(concat([*group.members, *sorted(extras, key=lambda unit: unit.order)]))
    return found


def _block_of(unit: Unit) -> tuple[str, ...]:
    """The innermost repeated container of a unit."""
    holes = [position for position, part in enumerate(unit.parts) if HOLE in part]
    return unit.parts[: holes[-1] + 1] if holes else unit.parts[:-2]


def _same_columns(units: Sequence[Unit]) -> bool:
    return all(
        squeezed(unit.shapes[role][index][1:]) == squeezed(units[0].shapes[role][index][1:])
        and unit.shapes[role][index] != ()
        for unit in units
        for role in unit.roles
        for index in unit.instances
    )


def _fit_along(units: Sequence[Unit], axis: int) -> bool:
    """Whether tensors can be joined along an axis; along the second one only matrices that have no other way."""
    if not axis:
        return _same_columns(units)
    return all(
        len(unit.shapes[role][index]) == 1
        or len(unit.shapes[role][index]) == 2
        and unit.shapes[role][index][0] == units[0].shapes[role][index][0]
        for unit in units
        for role in unit.roles
        for index in unit.instances
    ) and any(len(shape) == 2 for row in units[0].shapes.values() for shape in row.values())


def _side_by_side(members: Sequence[Unit]) -> dict[str, dict[Index, Shape]]:
    """Shapes of matrices joined along their columns, and of vectors joined along their only axis."""
    return {
        role: {
            index: (*row[index][:-1], sum(unit.shapes[role][index][-1] for unit in members))
            for index in members[0].instances
        }
        for role, row in members[0].shapes.items()
    }


def concat(members: Sequence[Unit], axis: int = 0) -> Unit:
    """The unit whose rows (with axis 1: columns) are the members' one after another."""
    shapes = _side_by_side(members) if axis else _one_below_the_other(members)
    shared = _shared_prefix([unit.parts for unit in members])
    name = "+".join(".".join(unit.parts[len(shared) :]) for unit in members)
    tokens = _joined_tokens(members)
    order = min(unit.order for unit in members)
    return Unit((*shared, name), {}, shapes, order, "concat", tuple(members), axis, tokens)


def _one_below_the_other(members: Sequence[Unit]) -> dict[str, dict[Index, Shape]]:
    first = members[0]
    return {
        role: {
            index: (
                sum(unit.shapes[role][index][0] for unit in members),
                *min((unit.shapes[role][index][1:] for unit in members), key=len),
            )
            for index in first.instances
        }
        for role in first.roles
    }


def _stacks(unit: Unit) -> list[Unit]:
    """The unit with one of its indices turned into a leading dimension, for every index that allows it."""
    arity = len(unit.instances[0])
    return [stack for axis in range(arity) if (stack := _stack(unit, axis)) is not None]


def _stack(unit: Unit, axis: int) -> Unit | None:
    rows: dict[Index, list[int]] = defaultdict(list)
    for index in unit.instances:
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
        for role, row in unit.shapes.items()
    }
    if any(len(row) != len(rows) for row in shapes.values()):
        return None
    holes = [position for position, part in enumerate(unit.parts) if HOLE in part]
    parts = tuple(
        part.replace(HOLE, "") if position == holes[axis] else part
        for position, part in enumerate(unit.parts)
        if position != holes[axis] or part != HOLE
    )
    return Unit(parts, {}, shapes, unit.order, "stack", (unit,), axis, unit.tokens)


def _shared_prefix(names: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    shared: list[str] = []
    for column in zip(*(name[:-1] for name in names), strict=False):
        if len(set(column)) != 1:
            break
        shared.append(column[0])
    return tuple(shared)


def _joined_tokens(members: Sequence[Unit]) -> tuple[tuple[str, int], ...]:
    nearest: dict[str, int] = {}
    for unit in members:
        for word, distance in unit.tokens:
            if not word.startswith("#"):
                nearest[word] = min(distance, nearest.get(word, distance))
    return tuple(nearest.items())


def _distinct(units: Iterable[Unit]) -> list[Unit]:
    return list({tuple(map(id, unit.members)): unit for unit in units}.values())
