"""A match spelled out: what every target tensor is made of, in the schema of the conversion oracles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from port_kit.remap.suggest.alignment import drop_unit_dims
from port_kit.remap.suggest.match import Match
from port_kit.remap.suggest.module_groups import Index, ModuleGroup, Shape

#: ``{"from": [names], "op": ..., "detail": {...}}``
Entry = dict[str, Any]


def entries_of(item: Match) -> Iterator[tuple[str, Entry]]:
    """(target name, entry) of every tensor that a match explains."""
    for index, origin in item.alignment.pairs.items():
        for role in item.target.roles:
            if item.target.kind == "concat":
                yield from _splits(item, role, index, origin)
            elif item.target.kind == "stack":
                yield from _unstacks(item, role, index, origin)
            else:
                shape = item.target.shapes[role][index]
                entry = _entry(item.source, role, origin, shape)
                yield item.target.names[role][index], _changed(entry, item.change, shape)


def _changed(entry: Entry, change: str, shape: Shape) -> Entry:
    if change == "swap":
        half = shape[0] // 2
        return entry | {"op": "reorder", "detail": {"dim": 0, "runs": [[half, shape[0]], [0, half]]}}
    if change == "transpose" and len(shape) == 2:
        return entry | {"op": "transpose", "detail": {"perm": [1, 0]}}
    return entry


def _entry(source: ModuleGroup, role: str, index: Index, shape: Shape) -> Entry:
    if source.kind == "concat":
        return _concat(source, role, index)
    if source.kind == "stack":
        return _stack(source, role, index, shape)
    if source.kind == "weight_norm":
        return _weight_norm(source.members[0], role, index)
    return _single(source.names[role][index], source.shapes[role][index], shape)


def _single(name: str, given: Shape, shape: Shape) -> Entry:
    if given == shape:
        return {"from": [name], "op": "copy", "detail": {}}
    if drop_unit_dims(given) != drop_unit_dims(shape) and sorted(given) == sorted(shape) and len(given) in (2, 3):
        perm = [*range(len(given) - 2), len(given) - 1, len(given) - 2]
        return {"from": [name], "op": "transpose", "detail": {"perm": perm}}
    return {"from": [name], "op": "reshape", "detail": {"shape": list(shape)}}


def _weight_norm(member: ModuleGroup, role: str, index: Index) -> Entry:
    if role != "weight":
        return {"from": [member.names[role][index]], "op": "copy", "detail": {}}
    names = [member.names[part][index] for part in ("weight_g", "weight_v")]
    return {"from": names, "op": "computed", "detail": {"steps": ["weight_norm"]}}


def _concat(source: ModuleGroup, role: str, index: Index) -> Entry:
    names = [group.names[role][index] for group in source.members]
    parts = [{"source": name, "start": None, "stop": None} for name in names]
    dim = source.joined_along(source.shapes[role][index])
    return {"from": names, "op": "concat", "detail": {"dim": dim, "parts": parts}}


def _stack(source: ModuleGroup, role: str, index: Index, shape: Shape) -> Entry:
    (member,) = source.members
    axis = source.axis
    inner = [_entry(member, role, index[:axis] + (value,) + index[axis:], shape[1:]) for value in range(shape[0])]
    names = [name for entry in inner for name in entry["from"]]
    return {"from": names, "op": "stack", "detail": {"dim": 0, "parts": inner}}


def _splits(item: Match, role: str, index: Index, origin: Index) -> Iterator[tuple[str, Entry]]:
    name, given = item.source.names[role][origin], item.source.shapes[role][origin]
    start, dim = 0, item.target.joined_along(given)
    for member in item.target.members:
        shape = member.shapes[role][index]
        detail: dict[str, Any] = {"dim": dim, "start": start, "stop": start + shape[dim]}
        if not dim and (shape[0], *given[1:]) != shape:
            detail["reshape"] = list(shape)
        yield member.names[role][index], {"from": [name], "op": "split", "detail": detail}
        start += shape[dim]


def _unstacks(item: Match, role: str, index: Index, origin: Index) -> Iterator[tuple[str, Entry]]:
    name = item.source.names[role][origin]
    (member,) = item.target.members
    axis = item.target.axis
    for value in range(item.target.shapes[role][index][0]):
        inner = index[:axis] + (value,) + index[axis:]
        start = 0
        for leaf in member.members or (member,):
            shape = leaf.shapes[role][inner]
            detail: dict[str, Any] = {"dim": 0, "start": value, "stop": value + 1, "reshape": list(shape)}
            yield leaf.names[role][inner], {"from": [name], "op": "split", "detail": detail}
            start += shape[0]
