"""Matches written as rules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from port_kit.remap.rules import Op, Rule
from port_kit.remap.suggest.alignment import drop_unit_dims, relation
from port_kit.remap.suggest.index_expressions import index_expressions
from port_kit.remap.suggest.match import Match
from port_kit.remap.suggest.module_groups import INDEX_SLOT, Index, ModuleGroup, Shape
from port_kit.remap.suggest.virtual_groups import role_of

#: (target instance, source instance)
Pairs = tuple[tuple[Index, Index], ...]

#: Ops by relation of shapes; None for members of a stack that differ from it in rows, and are turned.
_CHANGES: dict[str | None, tuple[Op, ...]] = {
    "copy": (),
    "reshape": (Op("reshape"),),
    "flatten": (Op("reshape"),),
    "transpose": (Op("transpose"),),
    None: (Op("transpose"),),
}
_SWAP = Op.of("reorder", dim=0, parts=2, order=(1, 0))


@dataclass(frozen=True)
class RuleDraft:
    """One rule to be: which tensors of a source group go, by which fields, to which target groups.

    Attributes:
        source: a plain group.
        targets: plain groups; several for a split.
        role: the parameter of the modules.
        pairs: (target instance, source instance), the source's with all of its numbers.
        op, shard, into, take: the rule's other fields; ``{axis}`` in them is the stacked number.
        axis: which number of the source is stacked, or -1.
        given: the parameter of the source's modules, if it is another one.
    """

    source: ModuleGroup
    targets: tuple[ModuleGroup, ...]
    role: str
    pairs: Pairs
    op: tuple[Op, ...] = ()
    shard: str = ""
    into: str = ""
    take: str = ""
    axis: int = -1
    given: str = ""

    @property
    def source_role(self) -> str:
        """The parameter of the source's modules."""
        return self.given or self.role


def rules_of(item: Match, names: Collection[str]) -> list[Rule]:
    """The rules of one match.

    Args:
        item: the match.
        names: all source names: a rule must not match more of them than the match explains.
    """
    drafts = [draft for role in item.target.roles for draft in _drafts(item, role)]
    return [rule for merged in _merge_by_parameter(drafts) for rule in _rules_of_drafts(merged, names)]


def drop_rules(unused: Iterable[str], used: Collection[str], reason: str) -> list[tuple[Rule, list[str]]]:
    """Rules that leave sources out, each with the names that it leaves out: one for every module that no source shares
    with anything used (another component in the same file), one for every other name.
    """
    kept = {tuple(parts[:depth]) for parts in (name.split(".") for name in used) for depth in range(len(parts) + 1)}
    dropped: dict[tuple[str, ...], list[str]] = {}
    for name in unused:
        parts = tuple(name.split("."))
        depth = next((depth for depth in range(1, len(parts)) if parts[:depth] not in kept), len(parts))
        dropped.setdefault(parts[:depth], []).append(name)
    return [
        (Rule(re.escape(found[0]) if len(found) == 1 else rf"{re.escape('.'.join(module))}\..+", drop=reason), found)
        for module, found in dropped.items()
    ]


# -- parts of a match --------------------------------------------------------------------------------------------------


def _drafts(item: Match, role: str) -> Iterator[RuleDraft]:
    pairs = tuple(item.alignment.pairs.items())
    if item.target.kind == "concat":
        yield RuleDraft(item.source, item.target.members, role, pairs, _split_ops(item, role, pairs))
    elif item.target.kind == "stack":
        yield from _unstacked(item, role, pairs)
    elif item.source.kind == "concat":
        yield from _joined(item, role, pairs)
    elif item.source.kind == "stack":
        yield from _stacked(item, role, pairs)
    elif item.source.kind == "weight_norm":
        yield from _weight_norm(item, role, pairs)
    else:
        yield RuleDraft(item.source, (item.target,), role, pairs, _plain_op(item, role))


def _plain_op(item: Match, role: str) -> tuple[Op, ...]:
    if item.change == "swap":
        return (_SWAP,)
    shapes = [
        (item.source.shapes[role][origin], item.target.shapes[role][index])
        for index, origin in item.alignment.pairs.items()
    ]
    if item.change == "transpose":
        return (Op("transpose"),) if len(shapes[0][1]) == 2 else ()
    kinds = {relation(*pair) for pair in shapes}
    if kinds == {"copy"}:
        return ()
    return (Op("transpose"),) if kinds <= {"transpose"} else (Op("reshape"),)


def _split_ops(item: Match, role: str, pairs: Pairs) -> tuple[Op, ...]:
    """Return the split of a fused tensor, and the reshape of its parts if they have other axes behind the rows."""
    index, origin = pairs[0]
    given = item.source.shapes[role][origin]
    parts = [member.shapes[role][index] for member in item.target.members]
    dim = item.target.joined_along(given)
    if dim or all(part[1:] == given[1:] for part in parts):
        return (Op.of("split", dim=dim),)
    rows = [part[0] for part in parts]
    sizes = {"sizes": rows} if len(set(rows)) > 1 else {}  # without them, parts that are reshaped later are equal
    return Op.of("split", dim=0, **sizes), Op("reshape")


def _joined(item: Match, role: str, pairs: Pairs) -> Iterator[RuleDraft]:
    parts = part_names(item.source.members)
    index, origin = pairs[0]
    whole = item.target.shapes[role][index]
    dim = item.source.joined_along(whole)
    concat = Op.of("concat", dim=dim, parts=parts)
    for part, member in zip(parts, item.source.members, strict=True):
        fits = dim or member.shapes[role][origin][1:] == whole[1:]
        reshape = () if fits else (_reshape_rows(whole),)
        yield RuleDraft(member, (item.target,), role, pairs, (*reshape, concat), shard=part)


def _reshape_rows(whole: Shape) -> Op:
    """Return the reshape of some rows of a tensor to its other axes; of a matrix, for any number of columns."""
    columns = whole[1:]
    if len(drop_unit_dims(columns)) == 1:
        columns = tuple(-1 if extent > 1 else 1 for extent in columns)
    return Op.of("reshape", shape=("in0", *columns))


def part_names(members: Sequence[ModuleGroup]) -> tuple[str, ...]:
    """Names for the parts of a fused tensor: q, k, v or gate, up if the names say so, else numbers."""
    named = tuple(filter(None, map(role_of, members)))
    return named if len(set(named)) == len(members) else tuple(str(at) for at in range(len(members)))


def _stacked(item: Match, role: str, pairs: Pairs) -> Iterator[RuleDraft]:
    (member,) = item.source.members
    axis = item.source.axis
    spread = tuple(
        (index, (*origin[:axis], value, *origin[axis:]))
        for index, origin in pairs
        for value in range(item.source.shapes[role][origin][0])
    )
    index = pairs[0][0]
    inner = item.target.shapes[role][index][1:]
    change = _CHANGES[relation(member.shapes[role][spread[0][1]], inner)]
    start = 0
    for leaf in member.leaves:
        shape = leaf.shapes[role][spread[0][1]]
        if member.members:
            rows = f"[{{axis}}, {start}:{start + shape[0]}]"
            yield RuleDraft(leaf, (item.target,), role, spread, change, into=rows, axis=axis)
        else:
            yield RuleDraft(
                leaf, (item.target,), role, spread, (*change, Op.of("stack", dim=0)), shard="{axis}", axis=axis
            )
        start += shape[0]


def _weight_norm(item: Match, role: str, pairs: Pairs) -> Iterator[RuleDraft]:
    (member,) = item.source.members
    if role != "weight":
        yield RuleDraft(member, (item.target,), role, pairs)
        return
    magnitude = member.shapes["weight_g"][pairs[0][1]]
    dim = next((axis for axis, extent in enumerate(magnitude) if extent != 1), 0)
    op = Op.of("weight_norm", **({"dim": dim} if dim else {}))
    for part in "gv":
        yield RuleDraft(member, (item.target,), role, pairs, (op,), shard=part, given=f"weight_{part}")


def _unstacked(item: Match, role: str, pairs: Pairs) -> Iterator[RuleDraft]:
    (member,) = item.target.members
    axis = item.target.axis
    inner = item.source.shapes[role][pairs[0][1]][1:]
    for value in range(item.target.shapes[role][pairs[0][0]][0]):
        placed = tuple(((*index[:axis], value, *index[axis:]), origin) for index, origin in pairs)
        change = _CHANGES[relation(inner, member.shapes[role][placed[0][0]])]
        start = 0
        for leaf in member.leaves:
            rows = leaf.shapes[role][placed[0][0]][0]
            cut = f"[{value}, {start}:{start + rows}]" if member.members else f"[{value}]"
            start += rows
            yield RuleDraft(item.source, (leaf,), role, placed, change, take=cut)


# -- drafts to rules ---------------------------------------------------------------------------------------------------


def _merge_by_parameter(drafts: Sequence[RuleDraft]) -> list[list[RuleDraft]]:
    """Drafts of one module that differ in the parameter only (weight, bias) and keep its name."""
    merged: dict[object, list[RuleDraft]] = {}
    for draft in drafts:
        groups = (draft.source, *draft.targets)
        names = [group.first_name(draft.source_role if group is draft.source else draft.role) for group in groups]
        leaves = {name.rpartition(".")[2] for name in names}
        modules = tuple(name.rpartition(".")[0] for name in names)
        alone = draft.source_role if draft.given or len(leaves) > 1 else modules
        key = (draft.source, draft.targets, draft.pairs, draft.op, draft.shard, draft.into, draft.take, alone)
        merged.setdefault(key, []).append(draft)
    return list(merged.values())


def _rules_of_drafts(drafts: Sequence[RuleDraft], names: Collection[str]) -> list[Rule]:
    first = drafts[0]
    roles = tuple(draft.source_role for draft in drafts)
    columns = [sorted(set(column)) for column in zip(*(origin for _, origin in first.pairs), strict=True)]
    varying = [axis for axis, values in enumerate(columns) if len(values) > 1]
    captures = {axis: capture for capture, axis in enumerate(varying, start=1)}  # one value is written out
    expressions = index_expressions(first.pairs, captures)
    wanted = {first.source.names[role][origin] for role in roles for _, origin in first.pairs}
    pattern = _pattern(first.source, roles, columns, wanted, names)
    if pattern is not None and expressions is not None:
        axis = rf"\{captures[first.axis]}" if first.axis >= 0 else ""
        return [_rule(drafts, pattern, expressions, axis, 1 + max(captures.values(), default=0))]
    return [_literal_rule(drafts, pair) for pair in first.pairs]


def _literal_rule(drafts: Sequence[RuleDraft], pair: tuple[Index, Index]) -> Rule:
    """A rule for one instance, its numbers written out."""
    first, (index, origin) = drafts[0], pair
    pattern = _source_pattern(first.source, [draft.source_role for draft in drafts], list(map(str, origin)))
    axis = str(origin[first.axis]) if first.axis >= 0 else ""
    return _rule(drafts, pattern, list(map(str, index)), axis, 1)


def _pattern(
    group: ModuleGroup,
    roles: Sequence[str],
    columns: Sequence[Sequence[int]],
    wanted: Collection[str],
    names: Collection[str],
) -> str | None:
    """A pattern that matches the wanted names and no others, or None."""
    for any_number in (True, False):
        slots = [
            str(values[0]) if len(values) == 1 else r"(\d+)" if any_number else f"({'|'.join(map(str, values))})"
            for values in columns
        ]
        pattern = _source_pattern(group, roles, slots)
        if {name for name in names if re.fullmatch(pattern, name)} == set(wanted):
            return pattern
    return None


def _components(group: ModuleGroup, role: str) -> list[str]:
    """A name of the group with index slots for its numbers."""
    components = group.first_name(role).split(".")
    for depth, part in enumerate(group.parts[: len(components)]):
        if INDEX_SLOT in part:
            components[depth] = part
    return components


def _source_pattern(group: ModuleGroup, roles: Sequence[str], slots: Sequence[str]) -> str:
    components = _components(group, roles[0])
    if len(roles) > 1:
        components[-1] = ""
    remaining = iter(slots)
    texts = [
        re.escape(part).replace(r"\{\}", next(remaining)) if INDEX_SLOT in part else re.escape(part)
        for part in components
    ]
    if len(roles) > 1:
        texts[-1] = f"({'|'.join(re.escape(group.first_name(role).rpartition('.')[2]) for role in roles)})"
    return r"\.".join(texts)


def _rule(drafts: Sequence[RuleDraft], pattern: str, expressions: Sequence[str], axis: str, last: int) -> Rule:
    """The rule of drafts that differ in the parameter; ``last`` is the capture that holds its name."""
    first = drafts[0]
    leaf = rf"\{last}" if len(drafts) > 1 else ""
    targets = tuple(_target(group, first.role, expressions, leaf) for group in first.targets)
    return Rule(
        pattern,
        targets if len(targets) > 1 else targets[0],
        shard=first.shard.replace("{axis}", axis),
        into=first.into.replace("{axis}", axis),
        take=first.take,
        op=first.op,
    )


def _target(group: ModuleGroup, role: str, expressions: Sequence[str], leaf: str) -> str:
    components = _components(group, role)
    if leaf:
        components[-1] = leaf
    remaining = iter(expressions)
    return ".".join(part.replace(INDEX_SLOT, next(remaining)) if INDEX_SLOT in part else part for part in components)
