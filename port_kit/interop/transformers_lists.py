"""The names that transformers' renamings and converters give to the tensors of a checkpoint.

The order is that of transformers' loader: names in natural order, all renamings in turn, then the first converter that
matches. Renamings and converters themselves decide how a name changes; the ops of a converter are translated.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from port_kit.interop.generalize import Route
from port_kit.manifest import Manifest
from port_kit.remap.rules import Op

#: target -> the converter that makes it, and the names that each of its source patterns collected.
Collected = dict[str, tuple[Any, dict[str, list[str]]]]


class _Refused(Exception):
    """The reason why a converter has no equivalent."""


def converted_routes(transforms: Any, source: Manifest, refused: dict[str, str]) -> dict[str, tuple[Route, ...]]:
    """Return the routes of all names; converters without an equivalent are added to ``refused``."""
    transforms = deepcopy(list(transforms))  # they record their matches
    renamings = [item for item in transforms if not hasattr(item, "operations")]
    converters = [item for item in transforms if hasattr(item, "operations")]
    owners = {pattern: item for item in converters for pattern in item.source_patterns}
    routes: dict[str, tuple[Route, ...]] = {}
    collected: Collected = {}
    for name in sorted(source, key=_natural):
        renamed, pattern = name, None
        for item in renamings:
            renamed, _ = item.rename_source_key(renamed)
        for item in converters:
            renamed, pattern = item.rename_source_key(renamed)
            if pattern is not None:
                break
        if pattern is None:
            routes[name] = (Route((renamed,)),)
            continue
        owner, names = collected.setdefault(renamed, (owners[pattern], {}))
        names.setdefault(pattern, []).append(name)
        if owner is not owners[pattern]:
            refused[_label(owners[pattern])] = f"{_label(owner)} makes {renamed}, too"
    for target, (converter, names) in collected.items():
        try:
            routes.update({name: (route,) for name, route in _convert(converter, target, names, source).items()})
        except _Refused as error:
            refused[_label(converter)] = str(error)
    return routes


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _label(converter: Any) -> str:
    return f"WeightConverter({converter.source_patterns} -> {converter.target_patterns})"


def _convert(converter: Any, target: str, names: dict[str, list[str]], source: Manifest) -> dict[str, Route]:
    """Translate the ops of a converter for one target."""
    if converter.quantization_operation is not None or converter.distributed_operation is not None:
        raise _Refused("it quantizes or shards")
    ordered = [(name, at) for pattern in converter.source_patterns for at, name in enumerate(names.get(pattern, []))]
    shapes = {source[name].shape for name, _ in ordered}
    rank = len(next(iter(shapes)))
    plain: list[Op] = []
    joins: dict[str, int] = {}
    for op in converter.operations:
        kind = type(op).__name__
        if kind in ("MergeModulelist", "Concatenate", "Chunk") and kind not in joins:
            joins[kind] = op.dim
        elif joins or kind not in _PLAIN:
            raise _Refused(f"{kind} has no equivalent" if kind not in _PLAIN else f"{kind} after {' and '.join(joins)}")
        else:
            plain += _PLAIN[kind](op, rank)
    targets = _targets(converter, target)
    found = tuple(joins)
    if found == ("Chunk",) and len(ordered) == 1 and len(targets) > 1:
        return {ordered[0][0]: Route(targets, op=(*plain, _split(joins["Chunk"], len(targets), shapes.pop(), plain)))}
    if len(targets) > 1 or (plain and joins) or (len(ordered) > 1 and not joins):
        raise _Refused("its combination of ops, sources and targets has no equivalent")
    if not joins:
        return {ordered[0][0]: Route(targets, op=tuple(plain))}
    if found == ("Concatenate",):
        parts = tuple(str(number) for number in range(len(ordered)))
        op = (Op.of("concat", dim=joins["Concatenate"], parts=parts),) if len(parts) > 1 else ()
        return {name: Route(targets, part if op else "", op) for (name, _), part in zip(ordered, parts, strict=True)}
    if found == ("MergeModulelist",) and len(names) == 1:
        op = (Op.of("stack", dim=joins["MergeModulelist"]),)
        return {name: Route(targets, str(at), op) for name, at in ordered}
    if found == ("MergeModulelist", "Concatenate"):
        return _stacked(converter, targets, names, rank + 1, joins, len(shapes) == 1)
    raise _Refused(f"{' and '.join(found)} together have no equivalent")


def _targets(converter: Any, target: str) -> tuple[str, ...]:
    """The full names of a converter's targets, of which the loader knows the first."""
    patterns = converter.target_patterns
    if any(sign in pattern for sign in "\\*" for pattern in patterns) or patterns[0] not in target:
        raise _Refused("its targets have groups or wildcards")
    before, _, after = target.partition(patterns[0])
    return tuple(before + pattern + after for pattern in patterns)


def _split(dim: int, count: int, shape: tuple[int, ...], plain: list[Op]) -> Op:
    axis = dim % len(shape)
    if shape[axis] % count or any(op.name == "transpose" for op in plain):
        raise _Refused(f"Chunk of {list(shape)} on axis {dim} in {count} has no equal parts, or follows Transpose")
    return Op.of("split", dim=axis, sizes=(f"in{axis} // {count}",) * count)


def _stacked(
    converter: Any, targets: tuple[str, ...], names: dict[str, list[str]], rank: int, joins: dict[str, int], alike: bool
) -> dict[str, Route]:
    """Stacks that are concatenated on another axis: each tensor is written to its region."""
    stack, concat = (joins[kind] % rank for kind in ("MergeModulelist", "Concatenate"))
    if stack == concat or not alike or len({len(found) for found in names.values()}) > 1:
        raise _Refused("stacks of different sizes, or joined on the axis of the stack")
    extent = f"in{concat - (stack < concat)}"
    routes = {}
    for number, pattern in enumerate(pattern for pattern in converter.source_patterns if pattern in names):
        parts = [":"] * rank
        parts[stack], parts[concat] = "{}", f"{number}*{extent}:{number + 1}*{extent}"
        into = f"[{', '.join(parts)}]"
        routes.update({name: Route(targets, position=str(at), into=into) for at, name in enumerate(names[pattern])})
    return routes


# -- ops on one tensor ---------------------------------------------------------------------------------------------


def _transpose(op: Any, rank: int) -> list[Op]:
    if op.check_dims:
        raise _Refused("Transpose(check_dims=True) depends on the shape in the module")
    perm = list(range(rank))
    first, second = op.dim0 % rank, op.dim1 % rank
    perm[first], perm[second] = second, first
    return [Op.of("transpose", perm=perm)]


def _interleave(op: Any, rank: int) -> list[Op]:
    axes = [f"a{axis}" for axis in range(rank)]
    apart, together = axes.copy(), axes.copy()
    apart[op.dim], together[op.dim] = "(half two)", "(two half)"
    sides = (together, apart) if op.inverse else (apart, together)
    return [Op.of("rearrange", pattern=" -> ".join(map(" ".join, sides)), sizes=(("two", 2),))]


_PLAIN = {"Transpose": _transpose, "Interleave": _interleave}
