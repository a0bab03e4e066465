"""Alignment of groups by their shapes, and by the order in which layers correspond."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from port_kit.remap.suggest.module_groups import Index, ModuleGroup, Shape

#: How far a relation is from a plain copy; subtracted from a pair's score.
PENALTY: dict[str, float] = {"copy": 0.0, "reshape": 0.03, "transpose": 0.15, "flatten": 0.2}


@dataclass(frozen=True)
class Alignment:
    """Correspondence between the instances of a target group and those of a source group.

    Attributes:
        pairs: target instance -> source instance.
        relation: the worst relation of shapes over all instances and roles, a key of :data:`PENALTY`.
        order: ``same`` index, ``sequence`` (n-th to n-th), ``reversed`` (outer index counts down) or ``subset``.
    """

    pairs: Mapping[Index, Index]
    relation: str
    order: str

    @property
    def penalty(self) -> float:
        return PENALTY[self.relation] + (0.3 if self.order == "subset" else 0.0)


def drop_unit_dims(shape: Shape) -> Shape:
    """The shape without its dimensions of size one."""
    return tuple(size for size in shape if size != 1)


def relation(source: Shape, target: Shape) -> str | None:
    """Return the operation that turns one shape into the other: a key of :data:`PENALTY`, or None."""
    if source == target:
        return "copy"
    if drop_unit_dims(source) == drop_unit_dims(target):
        return "reshape"
    if len(source) == len(target) == 2 and source == target[::-1]:
        return "transpose"
    if len(source) == len(target) == 3 and source == (target[0], target[2], target[1]):
        return "transpose"
    same_rows = bool(source and target) and source[0] == target[0] and source[0] > 1
    if same_rows and len(source) != len(target) and math.prod(source) == math.prod(target):
        return "flatten"
    return None


def alignments(source: ModuleGroup, target: ModuleGroup) -> Iterator[Alignment]:
    """All orders of instances under which every tensor of the target fits its source, most natural first."""
    if source.roles != target.roles:
        return
    for order, pairs in _orders(source.instances, target.instances):
        worst = _worst_relation(source, target, pairs)
        if worst is not None:
            yield Alignment(pairs, worst, order)


def _orders(source: tuple[Index, ...], target: tuple[Index, ...]) -> Iterator[tuple[str, dict[Index, Index]]]:
    """Possible correspondences of instances, most natural first."""
    if source == target:
        yield "same", dict(zip(target, source, strict=True))
    elif len(source) == len(target):
        yield "sequence", dict(zip(target, source, strict=True))
    elif set(target) < set(source):
        yield "subset", {index: index for index in target}
    if len(source) == len(target) and source and source[0] and len({index[0] for index in source}) > 1:
        flipped = sorted(source, key=lambda index: (-index[0], *index[1:]))
        yield "reversed", dict(zip(target, flipped, strict=True))


def _worst_relation(source: ModuleGroup, target: ModuleGroup, pairs: Mapping[Index, Index]) -> str | None:
    """The relation furthest from a copy; None if tensors do not fit, or if only some of a role are transposed."""
    worst = ["copy"]
    for role, row in target.shapes.items():
        found = {relation(source.shapes[role][pairs[index]], shape) for index, shape in row.items()}
        if None in found or "transpose" in found and len(found) > 1:
            return None
        worst += filter(None, found)
    return max(worst, key=PENALTY.__getitem__)


def shape_class(group: ModuleGroup) -> tuple[int, tuple[tuple[str, Shape], ...]]:
    """Groups of one class differ in name only: same count of instances, roles and shapes of the first instance."""
    first = group.instances[0]
    return len(group.instances), tuple((role, drop_unit_dims(group.shapes[role][first])) for role in group.roles)


def signature(group: ModuleGroup) -> tuple[object, ...]:
    """Return the key that two groups must share to correspond: count of instances and element counts by role."""
    return (
        len(group.instances),
        tuple((role, tuple(sorted(math.prod(s) for s in group.shapes[role].values()))) for role in group.roles),
    )
