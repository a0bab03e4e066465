"""The ops of the rule language as data, and the checks of their arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from port_kit.dtypes import DTYPES
from port_kit.escape import quoted
from port_kit.remap.patterns import parse_size
from port_kit.remap.problems import remap_error
from port_kit.remap.transforms import find_transform

#: Errors of these codes, from a message and a hint.
op_error = partial(remap_error, "remap_op")
rules_error = partial(remap_error, "remap_rules")
#: op -> its arguments, the required ones with a star.
OPS: dict[str, tuple[str, ...]] = {
    "copy": (),
    "reshape": ("shape",),
    "transpose": ("perm",),
    "rearrange": ("*pattern", "sizes"),
    "reorder": ("*dim", "runs", "parts", "order"),
    "split": ("*dim", "sizes"),
    "concat": ("*dim", "*parts", "sizes"),
    "stack": ("*dim",),
    "cast": ("*dtype",),
    "fill": (),
}
#: Targets of a cast; torch casts to no dtype that packs several values per element.
CAST_DTYPES = tuple(name for name, dtype in DTYPES.items() if dtype.packed == 1)


@dataclass(frozen=True)
class Op:
    """One operation of a rule, by name: ``Op.of("split", dim=0, sizes=("q", "kv", "kv"))``.

    Attributes:
        name: a key of :data:`OPS` or the name of a registered transform.
        args: the arguments, sorted by name; lists are tuples.
    """

    name: str
    args: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, name: str, **args: object) -> Op:
        """Make an op from keyword arguments."""
        return cls(name, tuple(sorted((key, _frozen(value)) for key, value in args.items())))

    @classmethod
    def many(cls, value: object) -> tuple[Op, ...]:
        """Read the ``op`` of a rule: an op, its name, its dictionary, or several of them.

        Raises:
            RemapError: ``remap_rules`` for anything else.
        """
        if isinstance(value, (Op, str, Mapping)):
            value = [value] if value else []
        if not isinstance(value, Sequence):
            raise rules_error(f"op {quoted(value)} is not an op, a name or a list of them", 'such as op="transpose"')
        return tuple(map(cls._one, value))

    @classmethod
    def _one(cls, value: object) -> Op:
        if isinstance(value, Op):
            return value
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return cls.of(value["name"], **{key: item for key, item in value.items() if key != "name"})
        raise rules_error(f"op {quoted(value)} has no name", 'such as {name = "split", dim = 0}')

    def get(self, key: str, default: Any = None) -> Any:
        """Return the argument called ``key``."""
        return dict(self.args).get(key, default)

    @property
    def joins(self) -> bool:
        """Several sources fill one target together; the rule's ``shard`` names the part."""
        return self.name in ("concat", "stack") or self.name not in OPS and bool(find_transform(self.name).roles)

    def to_dict(self) -> dict[str, Any]:
        """Return the form in TOML and JSON: ``{"name": "split", "dim": 0, ...}``."""
        return {"name": self.name, **{key: _thawed(value) for key, value in self.args}}


def _frozen(value: object) -> object:
    if isinstance(value, Mapping):  # named sizes: {two = 2} is [["two", 2]]
        value = list(value.items())
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _thawed(value: object) -> object:
    return list(map(_thawed, value)) if isinstance(value, tuple) else value


def check_ops(ops: Sequence[Op], label: str, targets: int, *, has_shard: bool) -> None:
    """Refuse ops that do not exist, lack arguments, or cannot be combined in one rule.

    Raises:
        RemapError: ``remap_op``, or ``remap_size`` for an expression.
    """
    for op in ops:
        _check_arguments(op, label)
    joining = [op.name for op in ops if op.joins]
    if len(joining) > 1 or (joining and ops[-1].name != joining[0]):
        raise op_error(f"rule {quoted(label)} joins with {' and '.join(joining)}", "one joining op, the last")
    if joining and not has_shard:
        raise op_error(f"rule {quoted(label)} has {joining[0]} and no shard", "shard names the part that the source is")
    splits = [op.name for op in ops].count("split")
    if splits > 1 or bool(splits) != (targets > 1):
        hint = "split needs two or more targets (or shards); one target needs no split"
        raise op_error(f"rule {quoted(label)} has {splits} split and {targets} targets", hint)


def check_region(text: str) -> None:
    """Refuse a ``take`` or ``into`` that cannot be read; raises ``remap_op`` or ``remap_size``."""
    _check_sizes(tuple(bound for part in region_bounds(text) for bound in part if bound))


def _check_arguments(op: Op, label: str) -> None:
    if not isinstance(op.name, str):
        raise op_error(f"rule {quoted(label)} has the op {quoted(op.name)}", "an op has a name")
    allowed = OPS[op.name] if op.name in OPS else find_transform(op.name).args
    names = {name.lstrip("*") for name in allowed}
    given = {key for key, _ in op.args}
    missing = [name[1:] for name in allowed if name.startswith("*") and name[1:] not in given]
    if given - names or missing:
        hint = f"{op.name} takes {', '.join(allowed) or 'none'} (* is required)"
        raise op_error(f"op {op.name} of rule {quoted(label)} has arguments {sorted(given)}", hint)
    for key, value in op.args if op.name in OPS else ():
        what, holds = _KINDS.get(f"{op.name} {key}") or _KINDS[key]
        if not holds(value):
            raise op_error(f"op {op.name} of rule {quoted(label)} has {key} = {quoted(value)}", f"{key} is {what}")
        if key in ("sizes", "shape", "runs"):
            _check_sizes(value)
    if op.name == "rearrange":
        parse_rearrange(op.get("pattern"))


def _check_sizes(value: Any) -> None:
    if isinstance(value, str):
        parse_size(value)
    for item in value if isinstance(value, tuple) else ():
        _check_sizes(item)


def _is_size(value: Any) -> bool:
    return type(value) is int or isinstance(value, str)


def _all(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and bool(value) and all(holds(item) for item in value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_size, value))


#: Argument -> (expected kind, check); with the op before it if ops differ.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "dim": ("the number of an axis", lambda value: type(value) is int),
    "shape": ("a list of sizes", lambda value: value == () or _all(value, _is_size)),
    "sizes": ("a list of sizes", lambda value: _all(value, _is_size)),
    "rearrange sizes": (
        "a list of names with their sizes",
        lambda value: value == () or _all(value, lambda item: _is_pair(item) and isinstance(item[0], str)),
    ),
    "perm": ("a list of axes", lambda value: value == () or _all(value, lambda item: type(item) is int)),
    "order": ("a list of numbers", lambda value: _all(value, lambda item: type(item) is int)),
    "runs": ("a list of [start, stop]", lambda value: _all(value, _is_pair)),
    "parts": ("a list of names", lambda value: _all(value, _is_size) and len(set(map(str, value))) == len(value)),
    "reorder parts": ("a size", _is_size),
    "pattern": ("a text", lambda value: isinstance(value, str)),
    "dtype": (f"one of {', '.join(CAST_DTYPES)}", lambda value: value in CAST_DTYPES),
}


_AXIS = re.compile(r"\(([^()]*)\)|(\.\.\.|\w+)|\s+|(.)")


def parse_rearrange(pattern: str) -> tuple[list[list[str]], list[list[str]]]:
    """Parse ``"(h two) c -> (two h) c"`` to the names of each axis on both sides; raises ``remap_op``."""
    sides = pattern.split("->")
    if len(sides) != 2:
        raise op_error(f"rearrange {quoted(pattern)} has no single ->", 'such as "(h two) c -> (two h) c"')
    left, right = (_parse_side(side, pattern) for side in sides)
    names = sorted(name for axis in left for name in axis)
    if names != sorted(name for axis in right for name in axis) or len(set(names)) != len(names):
        raise op_error(f"rearrange {quoted(pattern)} does not use each name once per side", "no axis may be lost")
    return left, right


def _parse_side(side: str, pattern: str) -> list[list[str]]:
    axes = []
    for match in _AXIS.finditer(side):
        group, word, stray = match.groups()
        names = (group or word or stray or "").split()
        if word != "..." and not all(re.fullmatch(r"[A-Za-z_]\w*|1", name) for name in names):
            raise op_error(
                f"rearrange {quoted(pattern)} cannot be read at {quoted(match[0])}", "names, parentheses, 1 and ..."
            )
        if word or group is not None:
            axes.append([name for name in names if name != "1"])
    return axes


def region_bounds(text: str) -> list[tuple[str, ...]]:
    """Parse ``[\\2, 0:f]`` to one index or ``(start, stop)`` per axis; raises ``remap_op``."""
    if not text:
        return []
    body = text.strip()
    if not (body.startswith("[") and body.endswith("]")):
        raise op_error(f"part {quoted(text)} is not in brackets", "such as [0:3*h, :] or [\\2, 0:f]")
    parts = [tuple(bound.strip() for bound in part.split(":")) for part in body[1:-1].split(",")]
    if any(len(part) > 2 or part == ("",) for part in parts):
        raise op_error(f"part {quoted(text)} cannot be read", "one index or start:stop per axis, separated by commas")
    return parts
