"""From a rule and one source tensor to copy tasks: no other module computes the meaning of a rule."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from port_kit.dtypes import both_floating, keeps_values
from port_kit.errors import RemapError
from port_kit.escape import quoted
from port_kit.manifest import TensorSpec
from port_kit.regions import Region, Shape, full_region, region_shape, shifted, with_span
from port_kit.remap.names import NUMBER, template_of
from port_kit.remap.ops import Op
from port_kit.remap.patterns import MAX_NAME_LENGTH, compile_pattern, evaluate_sizes, parse_template
from port_kit.remap.problems import Problem, remap_error
from port_kit.remap.resolve_ops import Scope, axis_of, resolve_op, resolve_region, resolve_take
from port_kit.remap.rule import Rule, Rules, Sizes
from port_kit.remap.tensor_ops import Cast, Reshape, Slice, TensorOp

#: Operations, the region that their result fills, and its shape.
Branch = tuple[list[TensorOp], Region, Shape]


class CopyTask(NamedTuple):
    """A part of one source that is copied into a part of one target.

    Attributes:
        source, target: names of the tensors.
        ops: operations on the source, with all numbers known.
        region: region of the complete target that is written; for a part of ``concat`` whose place depends on the
            other parts, the region that all parts fill together.
        rule: the rule that the task results from.
        shard: the shard of a fused target, or empty.
        join: the joining op (``concat`` before its parts are placed, or a transform), or None.
        role: the part that this source is in the rule's join, also once its place is known.
        shape: shape of the result of the operations.
    """

    source: str
    ops: tuple[TensorOp, ...]
    target: str
    region: Region
    rule: Rule
    shard: str = ""
    join: Op | None = None
    role: str = ""
    shape: Shape = ()

    @property
    def group(self) -> tuple[str, Region, Op | None]:
        """The key that the parts of one join share."""
        return (self.target, self.region, self.join)


class Resolved(NamedTuple):
    """Result of the rules for one source.

    Attributes:
        tasks: the copy tasks; not valid if there are problems.
        dropped: regions that are not used, with their rules.
        problems: the reasons why the source cannot be mapped.
        rules: positions of the rules that match.
        affected: targets that the problems already account for.
    """

    tasks: tuple[CopyTask, ...] = ()
    dropped: tuple[tuple[Region, Rule], ...] = ()
    problems: tuple[Problem, ...] = ()
    rules: tuple[int, ...] = ()
    affected: tuple[str, ...] = ()


class Resolver:
    """Resolves sources by rules towards the targets of a manifest.

    Args:
        rules, target, sizes, allow_downcast: as for :func:`port_kit.remap.plan.check`.
        opaque: targets whose own loader alone knows their complete shape, and the tensor-parallel size. Such a target
            accepts a source that is that many times its size on one axis.
    """

    def __init__(
        self,
        rules: Rules,
        target: Mapping[str, TensorSpec],
        sizes: Sizes,
        *,
        allow_downcast: bool = False,
        opaque: tuple[Set[str], int] = (frozenset(), 1),
    ) -> None:
        self.rules = rules.rules
        self.target = dict(target)
        self.opaque = opaque
        self.sizes = evaluate_sizes(rules.sizes, sizes)
        self.allow_downcast = allow_downcast or rules.allow_downcast
        self.aliases: Mapping[str, str] = getattr(target, "aliases", {})  # a manifest has them
        patterns = [(number, compile_pattern(rule.source)) for number, rule in enumerate(self.rules) if rule.source]
        self._ordinary = [pattern for pattern in patterns if not self.rules[pattern[0]].fallback]
        self._fallback = [pattern for pattern in patterns if self.rules[pattern[0]].fallback]
        #: targets and tasks by everything else that they depend on but names: layers are alike
        self._alike: dict[object, tuple[list[TensorSpec], list[CopyTask]]] = {}

    def matches(self, name: str) -> list[tuple[int, re.Match[str]]]:
        """Return the rules that match a name: all ordinary ones, else the fallback ones."""
        if len(name) > MAX_NAME_LENGTH:
            return []
        for patterns in (self._ordinary, self._fallback):
            found = [(number, match) for number, pattern in patterns if (match := pattern.fullmatch(name))]
            if found:
                return found
        return []

    def resolve(self, name: str, spec: TensorSpec) -> Resolved:
        """Return the copy tasks of one source; problems are returned, not raised."""
        found = self.matches(name)
        if len(found) == 1:
            return self._by_rule(*found[0], name, spec)
        if not found:
            return Resolved(problems=(unmatched(name, spec.file),))
        rules = [self.rules[number] for number, _ in found]
        if not all(rule.take for rule in rules) and len({rule.source for rule in rules}) > 1:
            labels = " and ".join(rule.label for rule in rules)
            message = f"{name} matches {len(found)} rules: {labels}"
            problem = Problem("remap_ambiguous", message, source=name, file=spec.file)
            return Resolved(problems=(problem,), rules=tuple(number for number, _ in found))
        each = [self._by_rule(number, match, name, spec) for number, match in found]
        merged: list[Any] = [sum(fields, ()) for fields in zip(*each, strict=True)]
        return Resolved(*merged)

    def resolve_layers(self, task: CopyTask) -> Iterator[CopyTask]:
        """Yield the only task of a source in each layer after that of such a task, as far as they are alike."""
        rule, goal = task.rule, self.target[task.target]
        numbers = NUMBER.search(task.source), NUMBER.search(task.target)
        if None in numbers or len(rule.targets) > 1 or rule.uses_groups or self.aliases or self.opaque[0]:
            return
        (start, layer, stop), (first, _, last) = (_around(number) for number in numbers if number is not None)
        for at in itertools.count(int(layer) + 1):
            name, target = f"{start}{at}{stop}", f"{first}{at}{last}"
            found = self.matches(name) if self.target.get(target) == goal else []
            if len(found) != 1 or self.rules[found[0][0]] is not rule:
                return
            filled = [expand(text, found[0][1]) for text in (rule.targets[0], rule.shards[0])]
            if filled != [target, task.shard or task.role]:
                return
            yield CopyTask(name, task.ops, target, *task[3:])

    def _by_rule(self, number: int, match: re.Match[str], name: str, spec: TensorSpec) -> Resolved:
        rule = self.rules[number]
        scope = Scope(self.sizes, rule.label, name, match, spec.shape)
        try:
            if rule.drop:
                ops = resolve_take(rule.take, spec.shape, scope)
                region = ops[0].region if ops and isinstance(ops[0], Slice) else full_region(spec.shape)
                return Resolved(dropped=((region, rule),), rules=(number,))
            return self._map(number, scope, match, name, spec)
        except RemapError as error:
            problem = Problem(error.code, error.message, rule.label, name, spec.file)
            return Resolved(problems=(problem,), rules=(number,))

    def _map(self, number: int, scope: Scope, match: re.Match[str], name: str, spec: TensorSpec) -> Resolved:
        rule = self.rules[number]
        targets = [expand(text, match, scope) for text in rule.targets]
        if self.aliases:
            targets = [self.aliases.get(target, target) for target in targets]
        shards = [expand(text, match, scope) for text in rule.shards]
        for target in targets:
            if target not in self.target:
                return Resolved(problems=(self._no_target(rule, name, spec, target),), rules=(number,))
            if self.opaque[0]:
                self._infer_full_shape(rule, target, spec)
        goals = [self.target[target] for target in targets]
        key = (number, spec.shape, spec.dtype, *shards, match.groups() if rule.uses_groups else None)
        known_goals, known = self._alike.get(key, (None, []))
        if known_goals == goals:
            alike = [CopyTask(name, t.ops, target, *t[3:]) for t, target in zip(known, targets, strict=True)]
            return Resolved(tuple(alike), (), (), (number,))
        try:
            places = [self._place(rule, target, shard) for target, shard in zip(targets, shards, strict=True)]
            branches = _branches(rule, spec, scope, places)
        except RemapError as error:
            problem = Problem(error.code, error.message, rule.label, name, spec.file, targets[0])
            return Resolved(problems=(problem,), rules=(number,), affected=tuple(targets))
        join = rule.join if rule.join is not None and not _is_placed(rule.join) else None
        tasks = [
            CopyTask(name, tuple(ops), place.target, region, rule, place.shard, join, place.role, shape)
            for place, (ops, region, shape) in zip(places, branches, strict=True)
        ]
        problems = [problem for task in tasks for problem in self._check_dtype(task, spec)]
        if not problems:
            self._alike[key] = (goals, tasks)
        return Resolved(tuple(tasks), problems=tuple(problems), rules=(number,))

    def _place(self, rule: Rule, target: str, shard: str) -> _Place:
        """Return the base region of a target: the shard that is named, or all of it."""
        spec = self.target[target]
        if not shard or rule.join is not None:
            return _Place(target, "", shard, full_region(spec.shape))
        if shard not in spec.slots:
            known = ", ".join(spec.slots) or "none, it is a plain tensor"
            raise remap_error("remap_slot", f"{target} has no shard {quoted(shard)}; its shards: {known}")
        return _Place(target, shard, "", spec.slots[shard])

    def _infer_full_shape(self, rule: Rule, target: str, spec: TensorSpec) -> None:
        """Take the complete shape of an opaque target from the first source that is mapped to it."""
        opaque, ranks = self.opaque
        if ranks < 2 or target not in opaque or rule.op or rule.take or rule.into:
            return
        local = self.target[target]
        pairs = [pair for pair in zip(spec.shape, local.shape, strict=False) if pair[0] != pair[1]]
        if len(spec.shape) == len(local.shape) and len(pairs) == 1 and pairs[0][0] == pairs[0][1] * ranks:
            self.target[target] = replace(local, shape=spec.shape)

    @cached_property
    def _templates(self) -> Counter[str]:
        return Counter(map(template_of, self.target))

    def _no_target(self, rule: Rule, name: str, spec: TensorSpec, target: str) -> Problem:
        template = template_of(target)
        layers = self._templates[template] if template != target else 0
        code, what = "remap_unexpected", "which does not exist"
        if layers:
            code, what = "remap_beyond_layers", f"a layer that the target does not have ({layers} exist)"
        return Problem(code, f"{name} is mapped to {target}, {what}", rule.label, name, spec.file, target)

    def _check_dtype(self, task: CopyTask, spec: TensorSpec) -> list[Problem]:
        wanted = self.target[task.target].dtype
        dtype = next((op.dtype for op in reversed(task.ops) if isinstance(op, Cast)), spec.dtype)
        if keeps_values(dtype, wanted) or self.allow_downcast and both_floating(dtype, wanted):
            return []
        message = f"{task.source} is {dtype}; {task.target} is {wanted}, which cannot represent all of its values"
        return [Problem("remap_dtype", message, task.rule.label, task.source, spec.file, task.target)]


def _around(match: re.Match[str]) -> tuple[str, str, str]:
    return match.string[: match.start()], match[0], match.string[match.end() :]


def unmatched(name: str, file: str = "") -> Problem:
    """Return the problem of a source that no rule matches."""
    message = f"{name} matches no rule"
    if len(name) > MAX_NAME_LENGTH:
        message = f"{quoted(name)} is too long; at most {MAX_NAME_LENGTH} are matched"
    return Problem("remap_unexpected", message, source=name, file=file)


class _Place(NamedTuple):
    """Destination of one branch of a rule: a target, its shard or the role in a join, and the base region."""

    target: str
    shard: str
    role: str
    base: Region


def expand(text: str, match: re.Match[str], scope: Scope | None = None) -> str:
    """Fill a template; a group that took no part in the match is empty. Without a scope, expressions are left."""
    template = parse_template(text)
    if template.format is not None:
        form, groups = template.format
        return form % tuple([match[group] or "" for group in groups])
    filled = []
    for part in template.parts:
        if isinstance(part, str):
            filled.append(part)
        elif part[0] == "group":
            filled.append(match[int(part[1]) if part[1].isdigit() else part[1]] or "")
        else:
            filled.append(f"{{{part[1]}}}" if scope is None else str(scope.size(part[1])))
    return "".join(filled)


def _branches(rule: Rule, spec: TensorSpec, scope: Scope, places: Sequence[_Place]) -> list[Branch]:
    """Return the operations, the region and the result's shape for each target of a rule."""
    regions = [_region(rule, place, scope) for place in places]
    names = [op.name for op in rule.op]
    at = names.index("split") if "split" in names else len(rule.op)
    taken = resolve_take(rule.take, spec.shape, scope)
    ops, shape = _run(rule.op[:at], taken, spec.shape, scope, regions[0][1])
    results = [(ops, shape)]
    if at < len(rule.op):
        rest = rule.op[at + 1 :]
        parts = _split(rule.op[at], shape, scope, [content for _, content in regions], bool(rest))
        results = [
            _run(rest, [*ops, Slice(part, shape)], shape, scope, content)
            for part, (_, content) in zip(parts, regions, strict=True)
        ]
    return [
        _fit(rule, ops, shape, region, content, scope)
        for (ops, shape), (region, content) in zip(results, regions, strict=True)
    ]


def _region(rule: Rule, place: _Place, scope: Scope) -> tuple[Region, Shape]:
    """Return the region of the complete target that a branch fills, and the shape of its content."""
    base, content = place.base, region_shape(place.base)
    if rule.join is not None and _is_placed(rule.join):
        if rule.into:
            raise remap_error("remap_op", f"{scope.where}: {rule.join.name} with into")
        return _part(rule.join, place, content, scope)
    if "." in place.shard:  # one expert of fused experts, whose axis its sources do not have
        content = content[1:]
    if rule.into:
        region, content = resolve_region(rule.into, content, scope)
        return shifted(region, base), content
    return base, content


def _is_placed(join: Op) -> bool:
    """Return True if a join gives the places of its parts, so that none has to wait for the others."""
    return join.name == "stack" or join.name == "concat" and join.get("sizes") is not None


def _part(join: Op, place: _Place, content: Shape, scope: Scope) -> tuple[Region, Shape]:
    """Return the region of one part of a stack, or of a concatenation with sizes, and the shape of its content."""
    axis = axis_of(join, content, scope)
    if join.name == "stack":
        if not place.role.isdecimal() or int(place.role) >= content[axis]:
            code = "remap_beyond_layers" if place.role.isdecimal() else "remap_op"
            message = f"{scope.where}: shard {quoted(place.role)} of a stack of {content[axis]} in {place.target}"
            raise remap_error(code, message)
        start = int(place.role)
        return with_span(place.base, axis, start, start + 1), (*content[:axis], *content[axis + 1 :])
    roles, sizes = [str(role) for role in join.get("parts")], [scope.size(size) for size in join.get("sizes")]
    if place.role not in roles:
        message = f"{scope.where}: part {quoted(place.role)} of {place.target}; expected one of {', '.join(roles)}"
        raise remap_error("remap_slot", message)
    regions = _divided(content, axis, sizes, len(roles), f"{scope.where}: concat into {place.target}")
    region = regions[roles.index(place.role)]
    return region, region_shape(region)


def _divided(shape: Shape, axis: int, sizes: list[int], count: int, where: str) -> list[Region]:
    """Return the regions of consecutive parts; raises ``remap_shape`` unless their sizes add up to the extent."""
    if len(sizes) != count or sum(sizes) != shape[axis] or min(sizes) < 1:
        message = f"{where}: expected {count} sizes that add up to {shape[axis]} on axis {axis}, found {sizes}"
        raise remap_error("remap_shape", message)
    ends = itertools.accumulate(sizes)
    return [with_span(full_region(shape), axis, end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _run(
    ops: Sequence[Op], done: list[TensorOp], before: Shape, scope: Scope, content: Shape
) -> tuple[list[TensorOp], Shape]:
    """Append the operations of ops, and return the shape of their result; joining ops have none."""
    for op in ops:
        shape = done[-1].after if done else before
        done = done + ([] if op.joins else resolve_op(op, shape, scope, content))
    return done, done[-1].after if done else before


def _split(op: Op, shape: Shape, scope: Scope, contents: list[Shape], more: bool) -> list[Region]:
    """Return the regions of a split's parts: given sizes, else the targets' own extents, else equal parts."""
    axis = axis_of(op, shape, scope)
    if op.get("sizes") is not None:
        sizes = [scope.size(size) for size in op.get("sizes")]
    elif not more and all(len(content) == len(shape) for content in contents):
        sizes = [content[axis] for content in contents]
    else:
        sizes = [shape[axis] // len(contents)] * len(contents)
    return _divided(shape, axis, sizes, len(contents), f"{scope.where}: split into {len(contents)} targets")


def _fit(rule: Rule, ops: list[TensorOp], shape: Shape, region: Region, content: Shape, scope: Scope) -> Branch:
    """Check that the result has the shape of its region; the parts of other joins are checked together."""
    if rule.join is not None and not _is_placed(rule.join):
        return ops, region, shape
    extents = region_shape(region)
    if shape == content or not shape and content == (1,) == extents:  # a scale may be a number or a vector of one
        return (ops if shape == extents else [*ops, Reshape(shape, extents)]), region, extents
    message = f"{scope.where} results in shape {list(shape)}; the target takes {list(content)}"
    raise remap_error("remap_shape", message)
