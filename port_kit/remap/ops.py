"""The ops of the rule language: their arguments, and the steps that they become once shapes and sizes are known.

``split``, ``concat``, ``stack`` and joining transforms decide which source and target a part goes to; they are lowered
in :mod:`port_kit.remap.lower`. The ops here map one tensor to one tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from port_kit.checkpoint.dtypes import DTYPES
from port_kit.errors import RemapError
from port_kit.remap.boxes import Box, Shape
from port_kit.remap.expressions import evaluate, parse
from port_kit.remap.patterns import normalise
from port_kit.remap.steps import Call, Cast, Fill, Permute, Reorder, Reshape, Step, Take
from port_kit.remap.transforms import find_transform

if TYPE_CHECKING:
    from port_kit.remap.rules import Op, Rule

#: op -> the arguments that it takes, required ones first with a star.
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
#: Ops that say where a part of a fused tensor stands; a rule has at most one of them.
JOINING = ("concat", "stack")
#: What a cast may lead to; torch casts no dtype that packs several values per element.
CAST_DTYPES = tuple(name for name, dtype in DTYPES.items() if dtype.packed == 1)


def check_rule_ops(rule: Rule) -> None:
    """Refuse ops that do not exist, lack arguments, or cannot stand in one rule together."""
    for op in rule.op:
        _check_arguments(op, rule)
    names = [op.name for op in rule.op]
    joining = [name for name in names if name in JOINING or is_joining(name)]
    if len(joining) > 1 or (joining and names[-1] != joining[0]):
        raise _op_error(f"rule {rule.label!r} joins with {' and '.join(joining)}", "one joining op, the last")
    if joining and not rule.shard:
        raise _op_error(f"rule {rule.label!r} has {joining[0]} and no shard", "shard says which part the source is")
    if names.count("split") > 1 or ("split" in names) != (len(rule.targets) > 1):
        raise _op_error(
            f"rule {rule.label!r} has {names.count('split')} split and {len(rule.targets)} targets",
            "split goes with two or more targets (or shards), one target goes without",
        )
    for text in (rule.take, rule.into):
        for part in _box_parts(text):
            for bound in part:
                if bound:
                    parse(normalise(bound))


def is_joining(name: str) -> bool:
    """Whether an op is a registered transform that joins several sources."""
    return name not in OPS and bool(find_transform(name).roles)


def _check_arguments(op: Op, rule: Rule) -> None:
    if not isinstance(op.name, str):
        raise _op_error(f"rule {rule.label!r} has the op {op.name!r}", "an op has a name")
    allowed = OPS[op.name] if op.name in OPS else find_transform(op.name).args
    names = {name.lstrip("*") for name in allowed}
    given = {key for key, _ in op.args}
    missing = [name[1:] for name in allowed if name.startswith("*") and name[1:] not in given]
    if given - names or missing:
        raise _op_error(
            f"op {op.name} of rule {rule.label!r} has arguments {sorted(given)}",
            f"{op.name} takes {', '.join(allowed) or 'none'} (* is required)",
        )
    for key, value in op.args if op.name in OPS else ():
        kind = "pairs" if (op.name, key) == ("rearrange", "sizes") else "count" if op.name == "reorder" else ""
        what, holds = _KINDS[f"{key} {kind}" if f"{key} {kind}" in _KINDS else key]
        if not holds(value):
            raise _op_error(f"op {op.name} of rule {rule.label!r} has {key} = {value!r}", f"{key} is {what}")
    if op.name == "cast" and op.get("dtype") not in CAST_DTYPES:
        raise _op_error(f"cast to {op.get('dtype')!r}", f"dtypes: {', '.join(CAST_DTYPES)}")
    if op.name == "rearrange":
        _parse_pattern(op.get("pattern"))
    for value in _leaves([value for key, value in op.args if key in ("sizes", "shape", "runs")]):
        if isinstance(value, str):
            parse(normalise(value))


def _is_size(value: Any) -> bool:
    return type(value) is int or isinstance(value, str)


def _all(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and bool(value) and all(holds(item) for item in value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_size, value))


#: What arguments have to be, by name; with the word behind it where ops differ.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "dim": ("the number of an axis", lambda value: type(value) is int),
    "shape": ("a list of sizes", lambda value: value == () or _all(value, _is_size)),
    "sizes": ("a list of sizes", lambda value: _all(value, _is_size)),
    "sizes pairs": (
        "a list of names with their sizes",
        lambda value: value == () or _all(value, lambda item: _is_pair(item) and isinstance(item[0], str)),
    ),
    "perm": ("a list of axes", lambda value: value == () or _all(value, lambda item: type(item) is int)),
    "order": ("a list of numbers", lambda value: _all(value, lambda item: type(item) is int)),
    "runs": ("a list of [start, stop]", lambda value: _all(value, _is_pair)),
    "parts": ("a list of names", lambda value: _all(value, _is_size) and len(set(map(str, value))) == len(value)),
    "parts count": ("a size", _is_size),
    "pattern": ("a text", lambda value: isinstance(value, str)),
    "dtype": ("a dtype", lambda value: isinstance(value, str)),
}


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


class Scope:
    """The names that a rule's expressions may use for one source tensor, and how messages call the place.

    Names and place are worked out when the first expression or message asks: most rules have neither.
    """

    def __init__(
        self, sizes: Mapping[str, int], rule: str, name: str, match: re.Match[str] | None, shape: Shape
    ) -> None:
        self._sizes, self._rule, self._name, self._match, self._shape = sizes, rule, name, match, shape
        self._names: dict[str, int] | None = None

    @property
    def where(self) -> str:
        """The place, for messages."""
        return f"rule {self._rule!r} on {self._name}"

    @property
    def names(self) -> Mapping[str, int]:
        """Sizes, the source's extents (``in0`` ...), and the numeric groups (``_1`` ... and by name)."""
        if self._names is None:
            self._names = {**self._sizes, **{f"in{axis}": extent for axis, extent in enumerate(self._shape)}}
            if self._match is not None:
                groups = {f"_{number}": text for number, text in enumerate(self._match.groups(), 1)}
                groups.update(self._match.groupdict())
                self._names.update({key: int(text) for key, text in groups.items() if text and text.isdecimal()})
        return self._names

    def size(self, expression: int | str) -> int:
        """Evaluate a size; raises ``remap_size``."""
        text = normalise(expression) if isinstance(expression, str) else expression
        return evaluate(text, self.names, self.where)


def lower_op(op: Op, shape: Shape, scope: Scope, target: Shape | None) -> list[Step]:
    """Return the steps of an op that maps one tensor to one tensor.

    Args:
        op: any op but split, concat, stack and joining transforms.
        shape: the shape that it is applied to.
        scope: the names of size expressions.
        target: the shape of the target region, for ``reshape`` without a shape.

    Raises:
        RemapError: ``remap_shape`` or ``remap_size`` where the op does not fit the shape.
    """
    return _LOWERINGS.get(op.name, _lower_call)(op, shape, scope, target)


def _lower_copy(op: Op, shape: Shape, scope: Scope, target: Shape | None) -> list[Step]:
    return []


def _lower_reshape(op: Op, shape: Shape, scope: Scope, target: Shape | None) -> list[Step]:
    if op.get("shape") is None:
        after = target
        if after is None:
            raise _shape_error("reshape without a shape", "a known target", scope)
    else:
        after = tuple(scope.size(size) for size in op.get("shape"))
        if after.count(-1) == 1:
            known = -math.prod(after)
            after = tuple(math.prod(shape) // known if size == -1 and known else size for size in after)
    if math.prod(after) != math.prod(shape) or min(after, default=0) < 0:
        raise _shape_error(f"reshape of {list(shape)} to {list(after)}", "the same number of elements", scope)
    return [Reshape(shape, after)] if after != shape else []


def _lower_transpose(op: Op, shape: Shape, scope: Scope, target: Shape | None) -> list[Step]:
    rank = len(shape)
    perm = op.get("perm")
    if perm is None:
        perm = (*range(rank - 2), rank - 1, rank - 2) if rank > 1 else (0,) * rank
    if sorted(perm) != list(range(rank)):
        raise _shape_error(f"transpose {list(perm)} of shape {list(shape)}", f"each of {rank} axes once", scope)
    return [Permute(tuple(perm), shape)] if list(perm) != list(range(rank)) else []


def _lower_reorder(op: Op, shape: Shape, scope: Scope, target: Shape | None) -> list[Step]:
    dim = axis_of(op, shape, scope)
    if op.get("runs") is not None:
        runs = tuple((scope.size(start), scope.size(stop)) for start, stop in op.get("runs"))
    else:
        parts, order = scope.size(op.get("parts", 2)), op.get("order", (1, 0))
        if parts < 1 or shape[dim] % parts or sorted(order) != list(range(parts)):
            raise _shape_error(
                f"reorder of {shape[dim]} in {parts} parts as {list(order)}", "equal parts, each once", scope
            )
        size = shape[dim] // parts
        runs = tuple((part * size, (part + 1) * size) for part in order)
    ordered = sorted(runs)
    sound = all(0 <= start < stop <= shape[dim] for start, stop in runs)
    if not sound or any(one[1] > two[0] for one, two in zip(ordered, ordered[1:], strict=False)):
        raise _shape_error(f"runs {list(runs)} on an axis of {shape[dim]}", "disjoint runs inside it", scope)
    return [Reorder(dim, runs, shape)]


def _lower_cast(op: Op, shape: Shape, scope: Scope, target: Shape | None) -> list[Step]:
    return [Cast(op.get("dtype"), shape)]


def _lower_fill(op: Op, shape: Shape, scope: Scope, target: Shape | None) -> list[Step]:
    if math.prod(shape) != 1 or target is None:
        raise _shape_error(f"fill with shape {list(shape)}", "a source of one value and a known target", scope)
    return [Fill(shape, target)] if target != shape else []


def _lower_call(op: Op, shape: Shape, scope: Scope, target: Shape | None) -> list[Step]:
    after = find_transform(op.name).shape({"": shape}, dict(op.args))
    return [Call(op.name, op.args, shape, tuple(after))]


def axis_of(op: Op, shape: Shape, scope: Scope) -> int:
    """The axis that an op names; negative ones count from the end."""
    dim = op.get("dim")
    if not isinstance(dim, int) or not -len(shape) <= dim < len(shape):
        raise _shape_error(f"{op.name} on axis {dim} of shape {list(shape)}", "an axis that exists", scope)
    return dim % len(shape)


# -- rearrange -----------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\.\.\.|[A-Za-z_]\w*|\d+|[()]|\s+|(.)")


def _parse_pattern(pattern: str) -> tuple[list[list[str]], list[list[str]]]:
    sides = pattern.split("->")
    if len(sides) != 2:
        raise _op_error(f"rearrange {pattern!r} has no single ->", 'such as "(h two) c -> (two h) c"')
    left, right = (_parse_side(side, pattern) for side in sides)
    names = sorted(name for axis in left for name in axis)
    if names != sorted(name for axis in right for name in axis) or len(set(names)) != len(names):
        raise _op_error(f"rearrange {pattern!r} does not use each name once a side", "no axis may get lost")
    return left, right


def _parse_side(side: str, pattern: str) -> list[list[str]]:
    axes: list[list[str]] = []
    group: list[str] | None = None
    for match in _TOKEN.finditer(side):
        token = match[0]
        bad = match[1] or token.isdigit() and token != "1"
        if bad or (token == "(") == (group is not None) and token in "()" or (token == "..." and group is not None):
            raise _op_error(f"rearrange {pattern!r} cannot be read at {token!r}", "names, brackets, 1 and ...")
        if token == "(":
            group = []
        elif token == ")":
            assert group is not None
            axes.append(group)
            group = None
        elif token == "1":
            if group is None:
                axes.append([])
        elif not token.isspace():
            if group is None:
                axes.append([token])
            else:
                group.append(token)
    if group is not None:
        raise _op_error(f"rearrange {pattern!r} has an open bracket", "close it")
    return axes


def _lower_rearrange(op: Op, shape: Shape, scope: Scope, target: Shape | None) -> list[Step]:
    left, right = _parse_pattern(op.get("pattern"))
    given = {name: scope.size(size) for name, size in op.get("sizes", ())}
    rest = len(shape) - len(left) + 1
    if ["..."] in left:
        if rest < 0:
            raise _shape_error(f"rearrange {op.get('pattern')!r} of shape {list(shape)}", "more axes", scope)
        hidden = [[f"...{number}"] for number in range(rest)]
        left, right = (_unfold(side, hidden) for side in (left, right))
    if len(left) != len(shape):
        raise _shape_error(f"rearrange {op.get('pattern')!r} of shape {list(shape)}", f"{len(left)} axes", scope)
    sizes = dict(given)
    for axis, extent in zip(left, shape, strict=True):
        _infer(axis, extent, sizes, scope)
    atoms = [name for axis in left for name in axis]
    order = [name for axis in right for name in axis]
    split = tuple(sizes[name] for name in atoms)
    perm = tuple(atoms.index(name) for name in order)
    after = tuple(math.prod(sizes[name] for name in axis) for axis in right)
    steps: list[Step] = [Reshape(shape, split), Permute(perm, split)]
    steps.append(Reshape(steps[-1].after, after))
    return [step for step in steps if not _is_identity(step)]


def _unfold(side: list[list[str]], hidden: list[list[str]]) -> list[list[str]]:
    at = side.index(["..."])
    return [*side[:at], *hidden, *side[at + 1 :]]


def _infer(axis: list[str], extent: int, sizes: dict[str, int], scope: Scope) -> None:
    unknown = [name for name in axis if name not in sizes]
    known = math.prod(sizes[name] for name in axis if name in sizes)
    if len(unknown) == 1 and known > 0 and extent % known == 0:
        sizes[unknown[0]] = extent // known
    elif unknown or known != extent:
        raise _shape_error(
            f"an axis of {extent} as ({' '.join(axis)})", "sizes for all but one name that multiply to it", scope
        )


def _is_identity(step: Step) -> bool:
    if isinstance(step, Permute):
        return list(step.perm) == list(range(len(step.perm)))
    return isinstance(step, Reshape) and step.before == step.after


# -- boxes as text ---------------------------------------------------------------------------------------------------


def _box_parts(text: str) -> list[tuple[str, ...]]:
    if not text:
        return []
    body = text.strip()
    if not (body.startswith("[") and body.endswith("]")):
        raise _op_error(f"part {text!r} is not in brackets", "such as [0:3*h, :] or [\\2, 0:f]")
    parts = [tuple(bound.strip() for bound in part.split(":")) for part in body[1:-1].split(",")]
    if any(len(part) > 2 or part == ("",) for part in parts):
        raise _op_error(f"part {text!r} cannot be read", "one index or start:stop an axis, with commas between")
    return parts


def lower_box(text: str, shape: Shape, scope: Scope) -> tuple[Box, Shape]:
    """Read ``[\\2, 0:f]`` for a shape.

    Returns:
        The box, and the shape of its content without the axes that are given by an index.
    """
    parts = _box_parts(text)
    if len(parts) > len(shape):
        raise _shape_error(f"part {text} of shape {list(shape)}", "at most one entry an axis", scope)
    box, content = [], []
    for axis, extent in enumerate(shape):
        part = parts[axis] if axis < len(parts) else ("", "")
        start = scope.size(part[0]) if part[0] else 0
        stop = start + 1 if len(part) == 1 else scope.size(part[1]) if part[1] else extent
        if not 0 <= start < stop <= extent:
            raise _shape_error(f"part {text} of shape {list(shape)}: {start}:{stop}", "a part inside it", scope)
        box.append((start, stop))
        if len(part) > 1:
            content.append(stop - start)
    return tuple(box), tuple(content)


def lower_take(text: str, shape: Shape, scope: Scope) -> list[Step]:
    """The steps of a rule's ``take``."""
    if not text:
        return []
    box, content = lower_box(text, shape, scope)
    steps: list[Step] = [Take(box, shape)]
    if content != steps[0].after:
        steps.append(Reshape(steps[0].after, content))
    return steps


def _op_error(message: str, hint: str) -> RemapError:
    return RemapError(message, code="remap_op", hint=hint)


def _shape_error(given: str, required: str, scope: Scope) -> RemapError:
    return RemapError(
        f"{scope.where}: {given}; required: {required}",
        code="remap_shape",
        hint="compare the rule with both shapes",
    )


_LOWERINGS: dict[str, Callable[[Any, Shape, Scope, Shape | None], list[Step]]] = {
    "copy": _lower_copy,
    "reshape": _lower_reshape,
    "transpose": _lower_transpose,
    "rearrange": _lower_rearrange,
    "reorder": _lower_reorder,
    "cast": _lower_cast,
    "fill": _lower_fill,
}
