"""The plan: every element of a checkpoint and of a module accounted for, as a list of copy tasks.

Coverage, loading, conversion, export, LoRA mapping and explanations all read the tasks of one plan. A plan is complete
if every target element is written exactly once, and every source element is used or dropped with a reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import takewhile
from operator import attrgetter
from typing import Any, TypeVar

from port_kit.manifest import Manifest, TensorSpec
from port_kit.regions import (
    Region,
    first_overlap,
    full_region,
    intersection,
    region_numel,
    region_text,
    uncovered_numel,
)
from port_kit.remap.concat import place_group, roles_of
from port_kit.remap.error_context import add_context
from port_kit.remap.patterns import compile_pattern
from port_kit.remap.problems import Problem
from port_kit.remap.resolve import CopyTask, Resolved, Resolver, unmatched
from port_kit.remap.rule import Rule, Rules, Sizes
from port_kit.remap.tensor_ops import Reorder, Slice, source_region

#: The rules of a checkpoint that already has the target's names.
IDENTITY = Rules("identity", (Rule(r"(.+)", r"\1"),))
Item = TypeVar("Item")


@dataclass(frozen=True)
class Plan:
    """The copy tasks of a rule set for one checkpoint and one module.

    Attributes:
        rules, source, target: the rules, the checkpoint, and the module.
        tasks: all copy tasks, in the order of the sources.
        dropped: ``{source: reason}`` of sources that are not used at all.
        kept: ``{target: reason}`` of targets that keep their initial values.
        converted: the checkpoint has the target's names, and rules are not applied.
        problems: all gaps; empty in a plan of :meth:`~port_kit.remap.rules.RuleSet.compile`.
        sizes: the named sizes, evaluated.
    """

    rules: Rules
    source: Manifest
    target: Manifest
    tasks: tuple[CopyTask, ...]
    dropped: Mapping[str, str]
    kept: Mapping[str, str]
    converted: bool = False
    problems: tuple[Problem, ...] = ()
    sizes: Sizes = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Return True if there are no problems."""
        return not self.problems

    def explained(self) -> list[Problem]:
        """Return the problems, the first of them with the names that are absent and the closest existing names."""
        if not self.problems:
            return []
        return add_context(self.problems, self.rules, self.source, self.target, self.sizes)

    def by_target(self) -> dict[str, list[CopyTask]]:
        """Return the tasks of each target."""
        return grouped(self.tasks, attrgetter("target"))

    def by_source(self) -> dict[str, list[CopyTask]]:
        """Return the tasks of each source."""
        return grouped(self.tasks, attrgetter("source"))

    def joined(self) -> dict[object, list[CopyTask]]:
        """Return the tasks of each transform with several sources."""
        return grouped([task for task in self.tasks if task.join is not None], attrgetter("group"))


def grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    """Return items by their key, in the order of the first item of each."""
    found: dict[Any, list[Item]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return dict(found)


def check(
    rules: Rules,
    source: Manifest,
    target: Manifest,
    sizes: Sizes | None = None,
    *,
    allow_downcast: bool = False,
    opaque: tuple[Set[str], int] = (frozenset(), 1),
    resolver: Resolver | None = None,
) -> Plan:
    """Compile rules against two manifests without raising: the plan may be incomplete, and has the problems.

    Args:
        rules, source, target: the rules, the checkpoint (its ``naming`` says if it is converted), and the module.
        sizes: named sizes on top of the rules' own.
        allow_downcast: floating-point values may be rounded to the target's dtype.
        opaque: as for :class:`~port_kit.remap.resolve.Resolver`.
        resolver: one to use again, made of these arguments.
    """
    if resolver is None:
        resolver = Resolver(rules, target, sizes or {}, allow_downcast=allow_downcast, opaque=opaque)
    builder = PlanBuilder(rules, target, resolver, source.naming_for(rules.name))
    for name, spec in source.items():
        builder.add(name, spec)
    return builder.finish(source)


class PlanBuilder:
    """A plan in progress: :meth:`add` sources in any order, then :meth:`finish`.

    Rules are applied unless the checkpoint is known to be converted. That is recorded (``naming``), or follows from its
    names: no rule matches any of them, all of them are names of the target, and the rules only rename.

    Args:
        rules, target, resolver: as for :func:`check`.
        naming: ``original``, ``converted`` or ``other`` if recorded in the checkpoint or given, else empty.
    """

    def __init__(self, rules: Rules, target: Manifest, resolver: Resolver, naming: str) -> None:
        self.rules, self.target, self.resolver, self.naming = rules, target, resolver, naming
        self._identity = Resolver(IDENTITY, target, {}, allow_downcast=resolver.allow_downcast, opaque=resolver.opaque)
        self._identity.target = resolver.target
        self._known = {*target, *target.aliases}
        self._specs: dict[str, TensorSpec] = {}
        self._tasks: list[CopyTask] = []
        self._groups: dict[object, list[CopyTask]] = defaultdict(list)
        self._by_name: list[CopyTask] = []
        self._unmatched: list[Problem] = []
        self._problems: list[Problem] = []
        self._affected: set[str] = set()
        self._dropped: dict[str, str] = {}
        self._used: dict[int, int] = defaultdict(int)
        #: tasks of the same source in the next layers, found by the last add()
        self.layers: list[CopyTask] = []
        self._ahead: dict[str, tuple[CopyTask, TensorSpec, int]] = {}
        #: number of tasks of each source that have not been returned by add()
        self.pending: dict[str, int] = defaultdict(int)

    def add(self, name: str, spec: TensorSpec) -> list[list[CopyTask]]:
        """Add one source.

        Returns:
            The groups of tasks that can be executed now: single ones, and the tasks of a transform with several
            sources together. A part of a join that waits for the others is returned with the last of them.
        """
        self._specs[name] = spec
        ahead = self._ahead.pop(name, None)
        if ahead is not None and ahead[1].shape == spec.shape and ahead[1].dtype == spec.dtype:
            self._used[ahead[2]] += 1
            self._tasks.append(ahead[0])
            return [[ahead[0]]]
        self.layers = []
        if self._has_target_name(name):
            found = self._identity.resolve(name, spec)
            self._problems += found.problems
            self._by_name += found.tasks
            self._unmatched.append(unmatched(name, spec.file))
            return [[task] for task in found.tasks if not found.problems]
        found = self.resolver.resolve(name, spec)
        for number in found.rules:
            self._used[number] += 1
        self._problems += found.problems
        if found.problems:
            self._affected.update(found.affected)
            return []
        if self._account_source(name, spec, found) and found.tasks[0].join is None:
            layers = self.resolver.resolve_layers(found.tasks[0])
            self.layers = list(takewhile(self._is_new, layers))
            self._ahead.update({task.source: (task, spec, found.rules[0]) for task in self.layers})
        return [group for task in found.tasks for group in self._ready(task)]

    def _is_new(self, task: CopyTask) -> bool:
        return task.source not in self._specs and task.source not in self._ahead

    def _has_target_name(self, name: str) -> bool:
        if self.naming in ("converted", "original") or name not in self._known:
            return self.naming == "converted"
        return not self.resolver.matches(name)

    def finish(self, source: Manifest | None = None) -> Plan:
        """Account for everything and return the plan, complete or not."""
        renames = not any(rule.op or rule.take or rule.into for rule in self.rules.rules)
        converted = self.naming == "converted" or bool(self._unmatched) and not self._used and renames
        problems = self._problems + ([] if converted else self._unmatched)
        tasks = self._by_name if converted else self._tasks
        for group in self._groups.values():
            placed, wrong = place_group(group)
            tasks, problems = tasks + placed, problems + wrong
        if self.naming == "other" and not converted and self._known.issuperset(self._specs):
            if any(task.ops or task.source != task.target for task in tasks):
                problems.append(Problem("remap_mixed", "another rule set converted these names of the target"))
        kept, collisions = self._kept({task.target for task in tasks}, converted=converted)
        problems += collisions
        problems += self._account_targets(tasks, kept, problems)
        if not converted:
            problems += dead_rules(self.rules, self._used, kept)
        order = {name: at for at, name in enumerate(self._specs)}
        tasks = sorted(tasks, key=lambda task: order[task.source])
        sides = (self.rules, Manifest(self._specs) if source is None else source, self.target)
        return Plan(*sides, tuple(tasks), self._dropped, kept, converted, tuple(problems), self.resolver.sizes)

    def _ready(self, task: CopyTask) -> list[list[CopyTask]]:
        if task.join is None:
            self._tasks.append(task)
            return [[task]]
        group = self._groups[task.group]
        group.append(task)
        self.pending[task.source] += 1
        if len(group) != len(roles_of(task.join)):
            return []
        placed, _ = place_group(group)  # finish() reports the problems
        for part in placed:
            self.pending[part.source] -= 1
        return [[part] for part in placed] if task.join.name == "concat" else [placed] if placed else []

    def _account_source(self, name: str, spec: TensorSpec, found: Resolved) -> bool:
        """Check that every source element is used once per rule, or dropped; return True if one task uses all of them.

        Rules with ``take`` use disjoint parts. Several rules without it each use the complete source.
        """
        if len(found.tasks) == 1 and not found.dropped:
            if not any(isinstance(op, (Slice, Reorder)) for op in found.tasks[0].ops):  # others use all of their input
                return True
        dropped = [region for region, _ in found.dropped]
        parts = list(dropped)
        copies: dict[Rule, list[Region]] = defaultdict(list)
        for task in found.tasks:
            used = source_region(task.ops, [full_region(task.shape)])
            if task.rule.take:
                parts += used
            else:
                copies[task.rule] += used
        if not found.tasks and uncovered_numel(dropped, spec.shape) == 0:
            self._dropped[name] = found.dropped[0][1].drop
        uses = [[*dropped, *regions] for regions in copies.values()]
        for regions in [parts, *uses]:
            twice = first_overlap(regions)
            if twice is not None:
                one, other = (region_text(regions[at]) for at in twice)
                self._report("remap_overlap", f"{name} is used twice, in {one} and in {other}", name, spec)
                return False
        unused = min(uncovered_numel(regions, spec.shape) for regions in uses or [parts])
        if unused:
            self._report("remap_unused", f"{unused} of {spec.numel} elements of {name} are not used", name, spec)
        return False

    def _report(self, code: str, message: str, name: str, spec: TensorSpec) -> None:
        self._problems.append(Problem(code, message, source=name, file=spec.file))

    def _kept(self, written: Set[str], *, converted: bool) -> tuple[dict[str, str], list[Problem]]:
        """Return the targets that keep their initial values; a converted checkpoint may contain them or not."""
        kept: dict[str, str] = {}
        problems = []
        for rule in filter(attrgetter("keep"), self.rules):
            for name in filter(compile_pattern(str(rule.target)).fullmatch, self.target):
                if name in written and converted:
                    continue
                kept[name] = rule.keep
                if name in written and not rule.optional:
                    message = f"{name} is kept ({rule.keep}) and written"
                    problems.append(Problem("remap_collision", message, rule.label, target=name))
        return kept, problems

    def _account_targets(
        self, tasks: Sequence[CopyTask], kept: Mapping[str, str], problems: Sequence[Problem]
    ) -> list[Problem]:
        """Check that every target element is written once, or kept."""
        reported = self._affected | {problem.target for problem in problems if problem.target}
        by_target = grouped(tasks, attrgetter("target"))
        found = []
        for name, spec in self.resolver.target.items():
            written = by_target.get(name)
            if written:
                if len(written) == 1 and written[0].region == full_region(spec.shape):
                    continue
                found += target_problems(name, spec, written, reported=name in reported)
            elif name not in kept and name not in reported:
                message = f"{name} {list(spec.shape)} is not written by any source"
                found.append(Problem("remap_missing", message, target=name))
        return found


def target_problems(name: str, spec: TensorSpec, tasks: Sequence[CopyTask], *, reported: bool = False) -> list[Problem]:
    """Return collisions, overlaps and missing parts of one target, from all tasks that write it, joins placed.

    Args:
        reported: another problem already accounts for the missing elements.
    """
    places = {task.group if task.join is not None else at: (task.region, task) for at, task in enumerate(tasks)}
    regions = [region for region, _ in places.values()]  # the sources of a transform fill one region together
    twice = first_overlap(regions)
    if twice is not None:
        (one, first), (other, second) = (list(places.values())[at] for at in twice)
        code = "remap_collision" if one == other else "remap_overlap"
        message = f"{first.source} and {second.source} are both written to {name} {region_text(other)}"
        return [Problem(code, message, second.rule.label, second.source, target=name)]
    missing = uncovered_numel(regions, spec.shape)
    if reported or not missing:
        return []
    shards = tuple(shard for shard, region in spec.slots.items() if not _covered(region, regions))
    what = f"shards {', '.join(shards)}" if shards else f"{missing} of {spec.numel} elements"
    message = f"{name} lacks {what}; it got {', '.join(task.source for task in tasks[:4])}"
    return [Problem("remap_incomplete_group", message, tasks[0].rule.label, target=name, missing=shards)]


def _covered(region: Region, regions: Sequence[Region]) -> bool:
    common = [intersection(region, other) for other in regions]
    return sum(region_numel(part) for part in common if part) == region_numel(region)


def dead_rules(rules: Rules, used: Mapping[int, int], kept: Mapping[str, str]) -> list[Problem]:
    """Return rules without a match, and choices of which not exactly one spelling is in the checkpoint."""
    problems = []
    spellings: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for number, rule in enumerate(rules.rules):
        choice, _, spelling = rule.variant.partition(":")
        if choice:
            spellings[choice][spelling] += used.get(number, 0)
    for choice, counts in spellings.items():
        present = [spelling for spelling, count in counts.items() if count]
        if len(present) != 1:
            code, found = ("remap_ambiguous", "more than one") if present else ("remap_dead_rule", "no")
            message = f"{found} spelling of {choice} is in the checkpoint: {', '.join(present or counts)}"
            problems.append(Problem(code, message))
    for number, rule in enumerate(rules.rules):
        choice, _, spelling = rule.variant.partition(":")
        alive = any(map(compile_pattern(str(rule.target)).fullmatch, kept)) if rule.keep else used.get(number)
        expected = spellings[choice][spelling] > 0 if choice else not rule.fallback
        if not alive and expected and not rule.optional:
            problems.append(Problem("remap_dead_rule", f"rule {rule.label} matches nothing", rule.label))
    return problems
