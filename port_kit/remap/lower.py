"""From a rule and one source tensor to writes: the single place where a rule's meaning is worked out.

Compiling, loading, exporting and explaining all lower rules here, so that none of them can disagree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

from port_kit.checkpoint.dtypes import both_floating, keeps_values
from port_kit.errors import RemapError
from port_kit.manifest import TensorSpec
from port_kit.remap.boxes import Box, Shape, extents, whole
from port_kit.remap.expressions import evaluate_sizes
from port_kit.remap.matching import Matcher
from port_kit.remap.ops import JOINING, Scope, axis_of, is_joining, lower_box, lower_op, lower_take
from port_kit.remap.patterns import compile_pattern, parse_template
from port_kit.remap.problems import Problem, problem_from, template_of
from port_kit.remap.rules import Op, Rule, RuleSet
from port_kit.remap.steps import Cast, Reshape, Step, Take

#: Steps, the region that they fill, and the shape that comes out of them.
Branch = tuple[tuple[Step, ...], Box, Shape]


class Write(NamedTuple):
    """One part of one source on its way into one part of one target.

    Attributes:
        source: name of the source tensor.
        steps: what happens to it, with all numbers known.
        target: name of the target tensor.
        region: the box of the whole target that is written; for a part of ``concat`` whose place depends on the other
            parts, the box that all parts fill together.
        rule: the rule that says so.
        slot: the slot of a fused target, or empty.
        join: the joining op (``concat`` with places to work out, or a transform), or None.
        part: the part that this source is in the join.
        shape: the shape that comes out of the steps.
    """

    source: str
    steps: tuple[Step, ...]
    target: str
    region: Box
    rule: Rule
    slot: str = ""
    join: Op | None = None
    part: str = ""
    shape: Shape = ()

    @property
    def group(self) -> tuple[str, Box, Op | None]:
        """What the parts of one join have in common."""
        return (self.target, self.region, self.join)

    def placed(self, region: Box) -> Write:
        """This part of a concatenation at its own place."""
        return Write(self.source, self.steps, self.target, region, self.rule, self.slot, None, self.part, self.shape)


class Lowered(NamedTuple):
    """What rules make of one source: its writes, the parts that are dropped, and what is wrong.

    ``blamed`` are the targets that a source with problems does not reach: they miss nothing else.
    """

    writes: tuple[Write, ...] = ()
    dropped: tuple[tuple[Box, Rule], ...] = ()
    problems: tuple[Problem, ...] = ()
    rules: tuple[int, ...] = ()
    blamed: tuple[str, ...] = ()


class Lowering:
    """Lowers sources by a rule set towards the targets of a manifest.

    Args:
        rules: the rule set.
        target: the target tensors.
        sizes: named sizes on top of the rule set's own.
        narrow: allow floating-point values to be rounded to the target's dtype.
        aliases: second names of targets.
        elastic: targets whose own loader alone knows their whole shape, and the tensor-parallel size: such a target
            takes a source that is that many times its size on one axis.
    """

    def __init__(
        self,
        rules: RuleSet,
        target: Mapping[str, TensorSpec],
        sizes: Mapping[str, int],
        *,
        narrow: bool = False,
        aliases: Mapping[str, str] | None = None,
        elastic: tuple[Set[str], int] = (frozenset(), 1),
    ) -> None:
        self.rules = rules.rules
        self.target = dict(target)
        self.elastic = elastic
        self.sizes = evaluate_sizes(rules.sizes, sizes)
        self.narrow = narrow or rules.narrow
        self.matcher = Matcher(self.rules)
        self._aliases = dict(aliases or {})
        self._templates: dict[str, int] | None = None
        self._uses_groups = [_uses_groups(rule) for rule in self.rules]
        self._steps: dict[object, list[Branch]] = {}
        self._fills = [
            None if uses else _fill_of(rule) for rule, uses in zip(self.rules, self._uses_groups, strict=True)
        ]
        self._alike: dict[object, tuple[Write, Mapping[str, Box]]] = {}

    def matches(self, name: str) -> tuple[int, ...]:
        """Numbers of the rules that match a name."""
        return self.matcher.find(name)

    def fill(self, number: int, name: str) -> tuple[str, str] | None:
        """The target and the slot that a rule gives a name; None where it does not match, or does more than that."""
        fill = self._fills[number]
        match = compile_pattern(self.rules[number].source).fullmatch(name) if fill is not None else None
        return None if fill is None or match is None else (fill.target.of(match), fill.shard.of(match))

    def lower(self, name: str, spec: TensorSpec) -> Lowered:
        """Work out all that the rules make of one source; problems are returned, not raised."""
        found = self.matcher.find(name)
        if len(found) == 1:
            return self._repeat(found[0], name, spec, found) or self._one(found[0], name, spec, found)
        if not found:
            problem = Problem("remap_unexpected", f"{name} matches no rule", source=name, file=spec.file)
            return Lowered(problems=(problem,))
        if not all(self.rules[number].take for number in found):
            labels = " and ".join(self.rules[number].label for number in found)
            problem = Problem(
                "remap_ambiguous", f"{name} matches {len(found)} rules: {labels}", source=name, file=spec.file
            )
            return Lowered(problems=(problem,), rules=found)
        parts = [self._one(number, name, spec, found) for number in found]
        return Lowered(
            tuple(write for part in parts for write in part.writes),
            tuple(drop for part in parts for drop in part.dropped),
            tuple(problem for part in parts for problem in part.problems),
            found,
            tuple(target for part in parts for target in part.blamed),
        )

    def _repeat(self, number: int, name: str, spec: TensorSpec, found: tuple[int, ...]) -> Lowered | None:
        """The write of a source that is like an earlier one in all but its name; None where none was."""
        fill = self._fills[number]
        if fill is None:
            return None
        match = self.matcher.match(number, name)
        target, shard = fill.target.of(match), fill.shard.of(match)
        if self._aliases:
            target = self._canonical(target)
        goal = self.target.get(target)
        if goal is None:
            return None
        alike = self._alike.get((number, shard, spec.shape, spec.dtype, goal.shape, goal.dtype))
        if alike is None or self.elastic[1] > 1 and target in self.elastic[0]:
            return None
        write, slots = alike
        if slots is not goal.slots and slots != goal.slots:
            return None
        return Lowered((Write(name, write.steps, target, *write[3:]),), (), (), found)

    def _one(self, number: int, name: str, spec: TensorSpec, found: tuple[int, ...]) -> Lowered:
        rule = self.rules[number]
        match = self.matcher.match(number, name)
        try:
            if rule.drop:
                steps = lower_take(rule.take, spec.shape, self._scope(rule, match, name, spec.shape))
                box = steps[0].box if steps and isinstance(steps[0], Take) else whole(spec.shape)
                return Lowered(dropped=((box, rule),), rules=found)
            return self._map(number, match, name, spec, found)
        except RemapError as error:
            return Lowered(problems=(problem_from(error, rule=rule.label, source=name, file=spec.file),), rules=found)

    # -- rules with targets ------------------------------------------------------------------------------------

    def _map(self, number: int, match: re.Match[str], name: str, spec: TensorSpec, found: tuple[int, ...]) -> Lowered:
        rule = self.rules[number]
        scope = self._scope(rule, match, name, spec.shape)
        names = [self._canonical(expand(text, match, scope)) for text in rule.targets]
        shards = [expand(text, match, scope) for text in rule.shards]
        problems = [self._no_target(rule, name, spec, target) for target in names if target not in self.target]
        if problems:
            return Lowered(problems=tuple(problems), rules=found)
        try:
            places, lowered = self._lower_places(
                rule, number, match, spec, scope, list(zip(names, shards, strict=True))
            )
        except RemapError as error:
            problem = problem_from(error, rule=rule.label, source=name, file=spec.file, target=names[0])
            return Lowered(problems=(problem,), rules=found, blamed=tuple(names))
        joins = _join_of(rule)
        writes, problems = [], []
        for place, (steps, region, shape) in zip(places, lowered, strict=True):
            join = joins if joins is not None and joins.name != "stack" else None
            write = Write(name, steps, place.target, region, rule, place.slot, join, place.part if join else "", shape)
            writes.append(write)
            problems += self._check_dtype(write, spec)
        if not problems and len(writes) == 1:
            goal = self.target[names[0]]
            key = (number, shards[0] if shards else "", spec.shape, spec.dtype, goal.shape, goal.dtype)
            self._alike[key] = (writes[0], goal.slots)
        return Lowered(tuple(writes), problems=tuple(problems), rules=found)

    def _lower_places(
        self,
        rule: Rule,
        number: int,
        match: re.Match[str],
        spec: TensorSpec,
        scope: Scope,
        targets: list[tuple[str, str]],
    ) -> tuple[list[_Place], list[Branch]]:
        """Find the places that a rule leads to, and the steps to them; worked out once for tensors that are alike."""
        for target, _ in targets:
            self._stretch(rule, target, spec)
        joins = _join_of(rule)
        places = [self._place(rule, target, shard, joins) for target, shard in targets]
        key = self._key(number, match, spec, places)
        if key not in self._steps:
            self._steps[key] = self._lower_steps(rule, spec, scope, places)
        return places, self._steps[key]

    def _key(self, number: int, match: re.Match[str], spec: TensorSpec, places: list[_Place]) -> object:
        groups = match.groups() if self._uses_groups[number] else ()
        shapes = tuple((place.base, place.shape, place.part) for place in places)
        return (number, spec.shape, groups, shapes)

    def _scope(self, rule: Rule, match: re.Match[str], name: str, shape: Shape) -> Scope:
        return Scope(self.sizes, rule.label, name, match, shape)

    def _canonical(self, target: str) -> str:
        return self._aliases.get(target, target)

    def _place(self, rule: Rule, target: str, shard: str, joins: Op | None) -> _Place:
        """Find the base region of a target: the slot that the shard names, or all of it."""
        spec = self.target[target]
        if not shard or joins is not None:
            return _Place(target, "", shard, whole(spec.shape), spec.shape)
        if shard not in spec.slots:
            known = ", ".join(spec.slots) or "none: it is a plain tensor"
            raise RemapError(
                f"{target} has no slot {shard!r}; its slots: {known}",
                code="remap_slot",
                hint="use a slot that the target has, or concat for a plain tensor",
            )
        return _Place(target, shard, "", spec.slots[shard], spec.shape)

    def _stretch(self, rule: Rule, target: str, spec: TensorSpec) -> None:
        """Take the whole shape of an elastic target from the first source that is sent to it."""
        elastic, ranks = self.elastic
        if ranks < 2 or target not in elastic or rule.op or rule.take or rule.into:
            return
        local = self.target[target]
        pairs = [pair for pair in zip(spec.shape, local.shape, strict=False) if pair[0] != pair[1]]
        if len(spec.shape) == len(local.shape) and len(pairs) == 1 and pairs[0][0] == pairs[0][1] * ranks:
            self.target[target] = replace(local, shape=spec.shape)

    def _lower_steps(self, rule: Rule, spec: TensorSpec, scope: Scope, places: list[_Place]) -> list[Branch]:
        """For each target: the steps, the region, and the shape that comes out of the steps."""
        steps = lower_take(rule.take, spec.shape, scope)
        shape = steps[-1].after if steps else spec.shape
        names = [op.name for op in rule.op]
        split_at = names.index("split") if "split" in names else len(rule.op)
        regions = [self._region(rule, place, scope) for place in places]
        steps, shape = _run(rule.op[:split_at], steps, shape, scope, regions[0][1])
        if split_at == len(rule.op):
            branches = [(steps, shape)]
        else:
            rest = rule.op[split_at + 1 :]
            boxes = _split(rule.op[split_at], shape, scope, [content for _, content in regions], bool(rest))
            branches = []
            for box, (_, content) in zip(boxes, regions, strict=True):
                branches.append(_run(rest, [*steps, Take(box, shape)], extents(box), scope, content))
        return [
            _fit(rule, list(branch), shape, region, content, scope)
            for (branch, shape), (region, content) in zip(branches, regions, strict=True)
        ]

    def _region(self, rule: Rule, place: _Place, scope: Scope) -> tuple[Box, Shape]:
        """The box of the whole target that a branch fills, and the shape of its content."""
        base = place.base
        stack = next((op for op in rule.op if op.name == "stack"), None)
        content = extents(base)
        if stack is not None:
            axis = axis_of(stack, content, scope)
            if not place.part.isdecimal() or int(place.part) >= content[axis]:
                raise RemapError(
                    f"{scope.where}: part {place.part!r} of a stack of {content[axis]} in {place.target}",
                    code="remap_beyond_layers" if place.part.isdecimal() else "remap_op",
                    hint="shard must be a number from 0 up to the extent of the stacked axis",
                )
            at = base[axis][0] + int(place.part)
            base = (*base[:axis], (at, at + 1), *base[axis + 1 :])
            content = (*content[:axis], *content[axis + 1 :])
        if "." in place.slot:  # a slot of fused experts: one expert, whose axis its sources do not have
            content = content[1:]
        if not rule.into:
            return base, content
        if stack is not None:
            raise RemapError(
                f"{scope.where}: stack and into together", code="remap_op", hint="write the stacked axis in into"
            )
        box, content = lower_box(rule.into, content, scope)
        shifted = tuple((low + a, low + b) for (low, _), (a, b) in zip(base, box, strict=True))
        return shifted, content

    # -- checks ------------------------------------------------------------------------------------------------

    def _no_target(self, rule: Rule, name: str, spec: TensorSpec, target: str) -> Problem:
        if self._templates is None:
            self._templates = {}
            for known in self.target:
                template = template_of(known)
                self._templates[template] = self._templates.get(template, 0) + 1
        layers = self._templates.get(template_of(target), 0)
        if layers and template_of(target) != target:
            return Problem(
                "remap_beyond_layers",
                f"{name} is sent to {target}, a layer that the target does not have ({layers} exist)",
                rule.label,
                name,
                spec.file,
                target,
            )
        message = f"{name} is sent to {target}, which does not exist"
        return Problem("remap_unexpected", message, rule.label, name, spec.file, target)

    def _check_dtype(self, write: Write, spec: TensorSpec) -> list[Problem]:
        dtype, wanted = spec.dtype, self.target[write.target].dtype
        for step in write.steps:
            if isinstance(step, Cast):
                dtype = step.dtype
        if keeps_values(dtype, wanted) or self.narrow and both_floating(dtype, wanted):
            return []
        message = f"{write.source} is {dtype}; {write.target} is {wanted}, which cannot hold all of its values"
        return [Problem("remap_dtype", message, write.rule.label, write.source, spec.file, write.target)]


@dataclass(frozen=True)
class _Place:
    """Where a branch of a rule leads: a target, its slot or the part of a join, and the base region."""

    target: str
    slot: str
    part: str
    base: Box
    shape: Shape


@dataclass(frozen=True)
class _Text:
    """A template without expressions, as a format with the groups that fill it."""

    form: str
    groups: tuple[str | int, ...]

    def of(self, match: re.Match[str]) -> str:
        """The template filled; an optional group that took no part is empty."""
        if not self.groups:
            return self.form
        values = match.group(*self.groups)
        if not values or len(self.groups) > 1 and None in values:
            values = tuple(match[group] or "" for group in self.groups)
        return self.form % values


@dataclass(frozen=True)
class _Fill:
    """The names that a rule with one plain target makes."""

    target: _Text
    shard: _Text


def _fill_of(rule: Rule) -> _Fill | None:
    """The fill of a rule; None where it has several targets or expressions in their names."""
    if rule.drop or rule.keep or len(rule.targets) != 1 or len(rule.shards) > 1:
        return None
    target, shard = _text_of(rule.targets[0]), _text_of(rule.shards[0] if rule.shards else "")
    return _Fill(target, shard) if target is not None and shard is not None else None


def _text_of(template: str) -> _Text | None:
    form, groups = "", []
    for part in parse_template(template).parts:
        if isinstance(part, str):
            form += part.replace("%", "%%")
        elif part[0] == "group":
            form += "%s"
            groups.append(int(part[1]) if part[1].isdigit() else part[1])
        else:
            return None
    return _Text(form if groups else form.replace("%%", "%"), tuple(groups))


def _join_of(rule: Rule) -> Op | None:
    """The op that joins several sources, where the rule has one."""
    last = rule.op[-1] if rule.op else None
    return last if last is not None and (last.name in JOINING or is_joining(last.name)) else None


def expand(text: str, match: re.Match[str], scope: Scope) -> str:
    """Fill a template."""
    filled = []
    for part in parse_template(text).parts:
        if isinstance(part, str):
            filled.append(part)
        elif part[0] == "group":
            filled.append(match[int(part[1]) if part[1].isdigit() else part[1]] or "")
        else:
            filled.append(str(scope.size(part[1])))
    return "".join(filled)


def _run(
    ops: tuple[Op, ...], steps: list[Step], shape: Shape, scope: Scope, content: Shape
) -> tuple[list[Step], Shape]:
    """Add the steps of plain ops; joining ops say where a part goes and add none."""
    steps = list(steps)
    for op in ops:
        if op.name in JOINING or is_joining(op.name):
            continue
        more = lower_op(op, shape, scope, content)
        steps += more
        shape = more[-1].after if more else shape
    return steps, shape


def _split(op: Op, shape: Shape, scope: Scope, contents: list[Shape], more: bool) -> list[Box]:
    """The boxes of a split's parts: given sizes, else the targets' own extents, else equal parts."""
    axis = axis_of(op, shape, scope)
    if op.get("sizes") is not None:
        sizes = [scope.size(size) for size in op.get("sizes")]
    elif not more and all(len(content) == len(shape) for content in contents):
        sizes = [content[axis] for content in contents]
    else:
        sizes = [shape[axis] // len(contents)] * len(contents)
    if len(sizes) != len(contents) or sum(sizes) != shape[axis] or min(sizes) < 1:
        raise RemapError(
            f"{scope.where}: split of {shape[axis]} on axis {axis} in {sizes} for {len(contents)} targets",
            code="remap_shape",
            hint="the sizes must be one a target and add up to the axis",
        )
    boxes, at = [], 0
    for size in sizes:
        boxes.append((*whole(shape[:axis]), (at, at + size), *whole(shape[axis + 1 :])))
        at += size
    return boxes


def _fit(rule: Rule, steps: list[Step], shape: Shape, region: Box, content: Shape, scope: Scope) -> Branch:
    """Check that what comes out of the steps is what the region takes; parts of a join are checked together."""
    if rule.op and (rule.op[-1].name == "concat" or is_joining(rule.op[-1].name)):
        return tuple(steps), region, shape
    box = extents(region)
    if shape == content:
        if shape != box:
            steps.append(Reshape(shape, box))
        return tuple(steps), region, box
    if not shape and content == (1,) == box:  # a scale is stored as a number or as a vector of one
        return (*steps, Reshape(shape, box)), region, box
    raise RemapError(
        f"{scope.where} gives shape {list(shape)}; the target takes {list(content)}",
        code="remap_shape",
        hint="compare the rule with both shapes; the configuration may not be the checkpoint's",
    )


def _uses_groups(rule: Rule) -> bool:
    """Whether the numbers in a rule's boxes or ops depend on its groups."""
    texts = [rule.take, rule.into]
    for op in rule.op:
        if op.name not in ("concat", "stack"):
            texts += [str(value) for key, value in op.args if key in ("sizes", "shape", "runs", "parts")]
    names = "|".join(["_\\d+", *compile_pattern(rule.source).groupindex]) if rule.source else "_"
    return any("\\" in text or re.search(rf"\b(?:{names})\b", text) is not None for text in texts if text)
