"""LoRA files mapped by the rules of their base model: an adapter follows the copy tasks of the weight that it adapts.

The adapter of module M changes ``M.weight`` by ``B @ A``. Its rows are rows of B, its columns are columns of A. A copy
task that selects complete rows and columns is therefore followed exactly: B, biases and DoRA magnitudes by rows, A by
columns. The selection is measured, so built-in ops and registered transforms are treated alike: the ops run on a tensor
of row numbers and on one of column numbers. Everything else is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from port_kit.checkpoint.lora_names import (
    PREFIXES,
    Entry,
    read_entry,
    read_other,
    restore_names,
    split_by_part,
    without_prefixes,
)
from port_kit.errors import RemapError
from port_kit.manifest import TensorSpec
from port_kit.regions import Shape, full_region, region_shape
from port_kit.remap.problems import Problem, closest_match, raise_problems, remap_error
from port_kit.remap.resolve import CopyTask, Resolver, expand
from port_kit.remap.resolve_ops import Scope
from port_kit.remap.rule import Rule, Rules, Sizes
from port_kit.remap.tensor_ops import Call, Cast, TensorOp, apply

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PREFIXES", "Selection", "read_entry", "remap_lora", "restore_names", "select", "split_by_part"]
Value = TypeVar("Value")
Specs = Mapping[str, TensorSpec]
Parts = Mapping[str, Sequence[str]]
_cannot_follow = partial(remap_error, "remap_op", hint="merge the adapter into the base model's weights before loading")
_wrong = partial(remap_error, hint="the file may be damaged, or for another base model")
#: The module, or shard of a fused module, that an adapter is for, and the copy task of its weight.
Place = tuple[str, CopyTask | None]


def remap_lora(
    tensors: Mapping[str, Value],
    rules: Rules,
    *,
    sizes: Sizes | None = None,
    prefixes: Iterable[str] = PREFIXES,
    target: Specs | None = None,
    parts: Parts | None = None,
) -> dict[str, Value]:
    """Return a LoRA file's tensors under the names of the port's modules.

    With ``target``, adapters are checked against the weights that they adapt, and follow the copy tasks of them.
    Without it, adapters are only renamed.

    Args:
        tensors: the file's tensors by name.
        rules, sizes: the rule set of the base model's component, and named sizes as for loading.
        prefixes: prefixes of modules that are removed; the first under which the rules know the module counts.
        target: the manifest of the port's module.
        parts: names of the shards of fused modules, in the order of the shards: the module's
            ``packed_modules_mapping``. A shard without such a name has that of the source module, or of the shard
            (``module_shard`` if that is a number) if the source is fused.

    Raises:
        RemapError: ``lora_file`` for kinds of adapters that are not read, ``remap_unexpected`` for a module that the
            rules do not know or drop, ``remap_beyond_layers`` and ``remap_shape`` for one that does not fit the target,
            ``remap_incomplete_group`` if one of A and B is missing, ``remap_op`` if the adapter cannot follow the ops
            on the weight, ``remap_collision`` for two tensors of one name.
    """
    mapping = _Mapping(rules, sizes or {}, target, parts or {})
    modules, problems = _by_module(tensors, mapping, tuple(prefixes))
    renamed: dict[str, Value] = {}
    hint = ""
    for module, entries in modules.items():
        try:
            for new, entry, value in _follow(module, entries, tensors, mapping):
                if new in renamed:
                    message = f"{entry.name} and another tensor are both {new}"
                    problems.append(Problem("remap_collision", message, source=entry.name))
                renamed[new] = value
        except RemapError as error:
            problems.append(Problem(error.code, error.message, source=entries[0].name))
            hint = hint or error.hint
    hint = hint or "the file may be for another base model"
    raise_problems(problems, f"{rules.name} does not map the LoRA file", hint)
    return renamed


def _by_module(
    names: Collection[str], mapping: _Mapping, prefixes: tuple[str, ...]
) -> tuple[dict[str, list[Entry]], list[Problem]]:
    """Return the entries of each module by its original name, and the problems of the other tensors."""
    modules: dict[str, list[Entry]] = {}
    problems: list[Problem] = []
    entries = {name: read_entry(name) for name in names}
    others = {name: other for name, entry in entries.items() if entry is None and (other := read_other(name))}
    for kind in dict.fromkeys(kind for kind, _ in others.values()):
        found = [name for name, other in others.items() if other[0] == kind]
        message = f"{found[0]}: {kind} is not read ({len(found)} tensors); LoRA with matrices A and B is"
        problems.append(Problem("lora_file", message, source=found[0]))
    refused = {module for _, module in others.values()}
    for name, entry in entries.items():
        if name in others or entry is not None and entry.module in refused:
            continue
        if entry is None:
            problems.append(Problem("remap_unexpected", f"{name} is no tensor of a LoRA", source=name))
        elif (module := mapping.module_of(entry, prefixes)) is None:
            near = closest_match(name, [rule.source for rule in mapping.rules if rule.source])
            message = f"{name} belongs to no module that {mapping.name} maps"
            problems.append(Problem("remap_unexpected", message, source=name, near=near))
        else:
            modules.setdefault(module, []).append(entry)
    return modules, problems


class _Mapping:
    """Places of the tensors of modules: from the resolver, or from the names of rules alone if no target is known."""

    def __init__(self, rules: Rules, sizes: Sizes, target: Specs | None, parts: Parts) -> None:
        self.name, self.rules, self._target, self._parts = rules.name, rules.rules, target or {}, parts
        self.checks = target is not None
        self._resolver = Resolver(rules, self._target, sizes, allow_downcast=True)
        self._select = lru_cache(maxsize=None)(select)
        self._rows: dict[str, dict[str, int]] = {}

    def module_of(self, entry: Entry, prefixes: tuple[str, ...]) -> str | None:
        """Return the original name of an entry's module; None if the rules know none, or drop it."""
        bare = without_prefixes(entry.module, prefixes)
        return next((module for module in bare if self.source(module, entry.kind) is not None), None)

    def source(self, module: str, kind: str) -> str | None:
        """Return the tensor that an entry changes: the weight, the bias, or a parameter without a module."""
        names = [f"{module}.bias"] if kind == "diff_b" else [f"{module}.weight"]
        names += [module] if kind == "diff" else []
        return next((name for name in names if any(not rule.drop for rule, _ in self._matching(name))), None)

    def _matching(self, name: str) -> list[tuple[Rule, re.Match[str]]]:
        return [(self.rules[number], match) for number, match in self._resolver.matches(name)]

    def places(self, source: str, shape: Shape) -> list[Place]:
        """Return the places of a tensor of this shape.

        Raises:
            RemapError: the first problem of the resolver; ``remap_op`` for a place that no adapter can have.
        """
        if not self.checks:
            return self._renamed(source)
        found = self._resolver.resolve(source, TensorSpec(shape, "bfloat16"))
        if found.problems:
            problem = found.problems[0]
            raise _wrong(problem.code, f"an adapter of {list(shape)} does not fit {source}: {problem.message}")
        return [(self._place_name(task, len(found.tasks) == 1), task) for task in found.tasks]

    def has_places(self, source: str, shape: Shape) -> bool:
        """Return True if the target has the tensor, and this shape fits it."""
        found = self._resolver.resolve(source, TensorSpec(shape, "bfloat16"))
        return bool(found.tasks) and not found.problems

    def carry(self, task: CopyTask | None, kind: str, name: str, value: Any, shape: Shape) -> Any:
        """Return an adapter's tensor for the target of a copy task.

        Raises:
            RemapError: ``remap_op`` if it cannot follow the ops on the weight.
        """
        if task is None:
            return value
        ops = task.ops
        if kind in ("diff", "diff_b"):
            if not any(isinstance(op, Call) for op in ops):  # ops that move elements also move differences
                return apply(value, [op for op in ops if not isinstance(op, Cast)])
            kind = "diff"
        selection = self._select(ops, shape)
        found = selection.of(kind, value) if selection is not None else None
        if found is None:
            what = "other than complete rows and columns" if selection is None else "a part of the rows or columns"
            raise _cannot_follow(f"{name}: loading takes {what} of {task.source}")
        return found

    def _renamed(self, source: str) -> list[Place]:
        places: list[Place] = []
        matching = self._matching(source)
        if len({rule.source for rule, _ in matching}) > 1:
            labels = " and ".join(rule.label for rule, _ in matching)
            raise RemapError(f"{source} matches {len(matching)} rules: {labels}", code="remap_ambiguous")
        for rule, match in matching:
            moving = [op.name for op in rule.op if op.name not in ("copy", "cast")]
            if moving or rule.take or rule.into or len(rule.targets) > 1:
                what = ", ".join(moving) or "a part of it"
                raise _cannot_follow(f"{source} is rearranged ({what}); following it needs the module's manifest")
            scope = Scope(self._resolver.sizes, rule.label, source, match, ())
            target, shard = (expand(one[0], match, scope) if one else "" for one in (rule.targets, rule.shards))
            if not rule.drop:
                places.append((self._shard_name(target, shard, ("q", "k", "v"), source), None))
        return places

    def _place_name(self, task: CopyTask, alone: bool) -> str:
        spec = self._target[task.target]
        own = task.source if alone else ""
        shard = task.shard or next((name for name, region in spec.slots.items() if region == task.region), "")
        join = task.join or (None if shard else task.rule.join)  # a concat with sizes is placed already
        if join is not None:
            by_rows = join.name == "concat" and join.get("dim") in (0, -len(spec.shape))
            known = region_shape(spec.slots[task.role])[:1] if task.role in spec.slots else ()
            if by_rows and (task.shape[1:] != spec.shape[1:] or known and task.shape[:1] != known):
                raise _wrong("remap_shape", f"{task.source} gives {list(task.shape)} for a part of {list(spec.shape)}")
            if by_rows and (known or _leaf(task.target) in self._parts):
                self._check_rows(task, spec)
                return self._shard_name(task.target, task.role, [str(part) for part in join.get("parts")], own)
        elif shard and task.region == spec.slots[shard]:
            return self._shard_name(task.target, shard, list(spec.slots), own)
        elif task.region == full_region(spec.shape):
            return _module(task.target)
        raise _cannot_follow(f"{task.source} is a part of {task.target} that has no name of its own")

    def _check_rows(self, task: CopyTask, spec: TensorSpec) -> None:
        """Check that the parts of a concatenation that have adapters fit the target together."""
        rows = self._rows.setdefault(task.target, {})
        rows[task.role] = task.shape[0]
        parts = len(task.rule.join.get("parts")) if task.rule.join is not None else 0
        if sum(rows.values()) > spec.shape[0] or len(rows) == parts and sum(rows.values()) < spec.shape[0]:
            found = ", ".join(f"{role}: {count}" for role, count in rows.items())
            raise _wrong("remap_shape", f"{task.source}: parts of {found} rows for {spec.shape[0]} of {task.target}")

    def _shard_name(self, target: str, shard: str, shards: Sequence[str], source: str) -> str:
        """Return the name of a fused module's shard; ``source`` is the tensor that fills it alone, or empty."""
        module, leaf = _module(target), _leaf(target)
        if not shard:
            return module
        names = self._parts.get(leaf, ())
        at = shards.index(shard) if shard in shards else int(shard) if shard.isdecimal() else len(names)
        own = f"{leaf}_{shard}" if shard.isdecimal() else shard
        name = names[at] if at < len(names) else _leaf(source) or own
        return module.removesuffix(leaf) + name


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight").removesuffix(".bias")


def _leaf(tensor: str) -> str:
    return _module(tensor).rpartition(".")[2]


def _follow(
    module: str, entries: Sequence[Entry], tensors: Mapping[str, Any], mapping: _Mapping
) -> Iterator[tuple[str, Entry, Any]]:
    """Yield ``(new name, entry, value)`` for each tensor of one module's adapters and each of its places."""
    product = _check(module, entries, tensors) if mapping.checks else ()
    for entry in entries:
        value, kind, source = tensors[entry.name], entry.kind, mapping.source(module, entry.kind)
        assert source is not None
        if kind == "B.bias" and mapping.has_places(f"{module}.bias", product[:1]):
            kind, source = "diff_b", f"{module}.bias"
        shape = tuple(value.shape) if kind in ("diff", "diff_b") and mapping.checks else product
        for name, task in mapping.places(source, shape):
            yield name + entry.suffix, entry, mapping.carry(task, kind, entry.name, value, shape)


def _check(module: str, entries: Sequence[Entry], tensors: Mapping[str, Any]) -> Shape:
    """Check that the tensors of a module fit each other, and return the shape of the weight that they change."""
    halves: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry.kind in ("A", "B"):
            pair = halves.setdefault(entry.adapter, {})
            if entry.kind in pair:
                raise _wrong("remap_collision", f"{entry.name} and another tensor are both {entry.kind} of {module}")
            pair[entry.kind] = tensors[entry.name]
    shapes = {_product(module, pair) for pair in halves.values()}
    if not shapes:  # a difference of the weight; those of biases are checked by the resolver
        shapes = {tuple(tensors[entry.name].shape) for entry in entries if entry.kind == "diff"}
    if len(shapes) != 1 and any(entry.kind != "diff_b" for entry in entries):
        code = "remap_shape" if shapes else "remap_incomplete_group"
        found = " and ".join(map(str, map(list, sorted(shapes)))) or "neither A nor B"
        raise _wrong(code, f"{', '.join(entry.name for entry in entries)}: one shape is needed, found {found}")
    shape = shapes.pop() if shapes else ()
    for entry in entries:
        value = tensors[entry.name]
        rank = halves.get(entry.adapter, {}).get("A", value).shape[:1]
        along = shape[1:2] if value.ndim == 2 and value.shape[0] == 1 else shape[:1]  # of a magnitude over inputs
        wanted = {"alpha": (1,), "A.bias": tuple(rank), "B.bias": shape[:1], "magnitude": along}.get(entry.kind)
        if wanted is not None and (value.numel(),) != wanted:
            raise _wrong("remap_shape", f"{entry.name} has {list(value.shape)}; {module} needs {list(wanted)} values")
    return shape


def _product(module: str, pair: Mapping[str, Any]) -> Shape:
    """Return the shape of ``B @ A``."""
    if len(pair) < 2:
        missing = "B (lora_B, lora_up)" if "A" in pair else "A (lora_A, lora_down)"
        raise _wrong("remap_incomplete_group", f"{module} lacks {missing}")
    a, b = pair["A"].shape, pair["B"].shape
    if min(len(a), len(b)) < 2 or a[0] != b[1] or not a[0] or any(extent != 1 for extent in b[2:]):
        raise _wrong("remap_shape", f"{module} has A {list(a)} and B {list(b)}: (rank, inputs) and (outputs, rank) fit")
    return (b[0], *a[1:])


@dataclass(frozen=True)
class Selection:
    """The rows and columns of a weight that a chain of ops keeps, in their new order.

    A weight of shape (outputs, ...) has rows along its first axis and columns along all others together.

    Attributes:
        before: the weight's shape.
        after: the shape of the ops' result.
        rows, columns: numbers of rows and of columns; None for all of them in order.
    """

    before: Shape
    after: Shape
    rows: Tensor | None = None
    columns: Tensor | None = None

    def of(self, kind: str, value: Tensor) -> Tensor | None:
        """Return an adapter's tensor for the selected part of the weight.

        Args:
            kind: ``A``, ``B``, ``A.bias``, ``B.bias``, ``magnitude``, ``alpha`` or ``diff``.
            value: the tensor, for the complete weight.

        Returns:
            The tensor; None if it belongs to all columns (or all rows) together and some are left out.
        """
        if kind == "alpha":
            return value
        if kind == "A":
            return _take(value.flatten(1), 1, self.columns).reshape(value.shape[0], *self.after[1:])
        if kind == "B":
            return _take(value.flatten(1), 0, self.rows).reshape(-1, value.shape[1], *[1] * (len(self.after) - 2))
        if kind == "diff":
            chosen = _take(value.reshape(self.before[0], -1), 0, self.rows)
            return _take(chosen, 1, self.columns).reshape(self.after)
        by_inputs = kind == "magnitude" and value.ndim == 2 and value.shape[0] == 1
        along, across = (self.columns, self.rows) if by_inputs else (self.rows, self.columns)
        count = math.prod(self.before[:1] if by_inputs else self.before[1:])
        if across is not None and across.unique().numel() != count:
            return None
        longest = max(range(value.ndim), key=lambda axis: value.shape[axis], default=0)
        return value if kind == "A.bias" else _take(value, longest, along)


def select(ops: Sequence[TensorOp], shape: Shape) -> Selection | None:
    """Return the rows and columns of a weight that ops select; None if they do anything else.

    One axis is measured at a time: numbers along the other axes are expanded, not stored.
    """
    import torch

    ops = [op for op in ops if not isinstance(op, Cast)]  # an adapter keeps its own dtype
    if not ops:
        return Selection(shape, shape)
    rows, columns = torch.arange(shape[0]), torch.arange(math.prod(shape[1:]))
    try:
        after, by_row = _run(ops, rows.view(-1, *[1] * len(shape[1:])), shape)
        picked_rows = _constant(by_row, len(rows))
        del by_row
        _, by_column = _run(ops, columns.view(1, *shape[1:]), shape)
        picked_columns = _constant(by_column.T, len(columns))
        del by_column
        if picked_rows is None or picked_columns is None:
            return None
        if any(isinstance(op, Call) for op in ops):  # a transform may compute: try other values
            sample = torch.rand(shape, generator=torch.Generator().manual_seed(0))
            expected = sample.reshape(len(rows), -1)[picked_rows][:, picked_columns]
            if bool((_run(ops, sample, shape)[1] != expected).any()):
                return None
    except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError):  # from a registered transform
        return None
    pairs = ((picked_rows, rows), (picked_columns, columns))
    return Selection(shape, after, *[None if torch.equal(picked, every) else picked for picked, every in pairs])


def _run(ops: Sequence[TensorOp], values: Tensor, shape: Shape) -> tuple[Shape, Tensor]:
    """Return the shape of a result, and the result as a matrix.

    Values are float32, as transforms expect weights: exact for as many numbers as an axis has.
    """
    result = apply(values.float().expand(shape), ops)
    return tuple(result.shape), result.reshape(result.shape[0], -1)


def _constant(numbers: Tensor, count: int) -> Tensor | None:
    """Return the number in each row of a matrix; None if a row has several, or one that is not in ``range(count)``."""
    first = numbers[:, 0]
    sound = bool((numbers == first[:, None]).all()) and bool(((first >= 0) & (first < count)).all())
    return first.long() if sound and bool((first == first.long()).all()) else None


def _take(value: Tensor, axis: int, numbers: Tensor | None) -> Tensor:
    return value if numbers is None else value.index_select(axis, numbers.to(value.device))
