"""The compiler: a rule set, a source and a target become a plan in which every element is accounted for.

A plan is right when every target element is written exactly once and every source element is used exactly once or
dropped with a reason. All that is wrong is found in one pass and reported together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from port_kit.manifest import Manifest, TensorSpec
from port_kit.remap.boxes import Box, Shape, first_overlap, gaps, intersection, tiles, volume, whole
from port_kit.remap.diagnosis import diagnose
from port_kit.remap.joins import check_transform, place_parts
from port_kit.remap.lower import Lowered, Lowering, Write
from port_kit.remap.patterns import compile_pattern
from port_kit.remap.problems import Problem, raise_problems
from port_kit.remap.rules import Rule, RuleSet
from port_kit.remap.steps import back


@dataclass(frozen=True)
class Plan:
    """What a rule set does with one checkpoint and one module.

    Attributes:
        rules: the rule set.
        source: the checkpoint.
        target: the module.
        writes: all writes, in the order of the sources.
        dropped: ``{source: reason}`` of sources that are not used at all.
        kept: ``{target: reason}`` of targets that keep what they were built with.
        converted: the checkpoint has the target's names already and passes through unchanged.
        problems: all gaps; none in a plan that :func:`compile_plan` returned.
        rules_used: number of sources by the position of their rule.
    """

    rules: RuleSet
    source: Manifest
    target: Manifest
    writes: tuple[Write, ...]
    dropped: Mapping[str, str]
    kept: Mapping[str, str]
    converted: bool = False
    problems: tuple[Problem, ...] = ()
    rules_used: Mapping[int, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def explained(self) -> list[Problem]:
        """The problems, the first of them with the names that are absent and the nearest that exist."""
        if not self.problems:
            return []
        files = {name: spec.file for name, spec in self.source.items()}
        return diagnose(self.problems, self.rules, files, list(self.target), self.sizes)

    def by_target(self) -> dict[str, list[Write]]:
        """The writes of each target."""
        found: dict[str, list[Write]] = defaultdict(list)
        for write in self.writes:
            found[write.target].append(write)
        return dict(found)

    def by_source(self) -> dict[str, list[Write]]:
        """The writes of each source."""
        found: dict[str, list[Write]] = defaultdict(list)
        for write in self.writes:
            found[write.source].append(write)
        return dict(found)


def compile_plan(
    rules: RuleSet, source: Manifest, target: Manifest, sizes: Mapping[str, int], *, narrow: bool = False
) -> Plan:
    """Compile a rule set.

    Args:
        rules: the rule set.
        source: names, shapes and dtypes of the checkpoint.
        target: those of the module.
        sizes: named sizes on top of the rule set's own.
        narrow: allow floating-point values to be rounded to the target's dtype.

    Raises:
        RemapError: with every gap in ``details["problems"]``; the code is theirs, or ``remap_failed`` for several.
    """
    plan = check(rules, source, target, sizes, narrow=narrow)
    raise_problems(plan.explained(), f"{rules.name} does not map {source.origin or 'the source'} completely")
    return plan


def check(
    rules: RuleSet,
    source: Manifest,
    target: Manifest,
    sizes: Mapping[str, int] | None = None,
    *,
    narrow: bool = False,
    elastic: tuple[Set[str], int] = (frozenset(), 1),
    lowering: Lowering | None = None,
) -> Plan:
    """Compile without raising: the plan of what works, and the problems of what does not.

    ``elastic`` is explained at :class:`~port_kit.remap.lower.Lowering`; one that is given is used again.
    """
    lowering = lowering or Lowering(rules, target, sizes or {}, narrow=narrow, aliases=target.aliases, elastic=elastic)
    if is_converted(lowering, source, target):
        lowering = Lowering(IDENTITY, target, sizes or {}, narrow=narrow or rules.narrow)
        return _Compiler(lowering, rules, source, target, converted=True).run()
    return _Compiler(lowering, rules, source, target).run()


#: What an already converted checkpoint is loaded with.
IDENTITY = RuleSet("converted", (Rule(r"(.+)", r"\1", fallback=True),))


def is_converted(lowering: Lowering, source: Manifest, target: Manifest) -> bool:
    """Whether a checkpoint has the target's names and shapes already, and not the names that the rules expect."""
    if set(source) != set(target) or any(source[name].shape != target[name].shape for name in source):
        return False
    return any(not _is_original(lowering, name) for name in source)


def _is_original(lowering: Lowering, name: str) -> bool:
    """Whether an ordinary rule speaks of the name."""
    return any(not lowering.rules[number].fallback for number in lowering.matches(name))


class _Compiler:
    """One compilation: lowers all sources, resolves joins, then does the books."""

    def __init__(
        self, lowering: Lowering, rules: RuleSet, source: Manifest, target: Manifest, *, converted: bool = False
    ) -> None:
        self.lowering = lowering
        self.rules = rules
        self.source = source
        self.target = target
        self.converted = converted
        self.problems: list[Problem] = []
        self.writes: list[Write] = []
        self.used: dict[int, int] = defaultdict(int)
        self.dropped: dict[str, str] = {}
        self.kept: dict[str, str] = {}
        self.blamed: set[str] = set()

    def run(self) -> Plan:
        lowered = {name: self._lower(name, spec) for name, spec in self.source.items()}
        self._place_joins([write for found in lowered.values() for write in found.writes])
        self._account_sources(lowered)
        self._keep()
        self._account_targets()
        if not self.converted:
            self.problems += dead_rules(self.rules, self.used, self.kept)
        order = {name: at for at, name in enumerate(self.source)}
        self.writes.sort(key=lambda write: order[write.source])
        return Plan(
            self.rules,
            self.source,
            self.target,
            tuple(self.writes),
            self.dropped,
            self.kept,
            self.converted,
            tuple(self.problems),
            dict(self.used),
            self.lowering.sizes,
        )

    def _lower(self, name: str, spec: TensorSpec) -> Lowered:
        found = self.lowering.lower(name, spec)
        for number in found.rules:
            self.used[number] += 1
        if found.problems:
            self.problems += found.problems
            self.blamed.update(found.blamed)
        return found

    def _place_joins(self, writes: Iterable[Write]) -> None:
        groups: dict[object, list[Write]] = defaultdict(list)
        for write in writes:
            if write.join is None:
                self.writes.append(write)
            else:
                groups[write.group].append(write)
        for parts in groups.values():
            if parts[0].join is not None and parts[0].join.name == "concat":
                placed, problems = place_parts(parts, self.lowering.sizes)
                self.writes += placed
            else:
                problems = check_transform(parts)
                self.writes += [] if problems else parts
            self.problems += problems

    def _account_sources(self, lowered: Mapping[str, Lowered]) -> None:
        """Every source element is used once, or dropped with a reason."""
        sound: set[object] = set()
        for name, found in lowered.items():
            if found.problems:
                continue
            spec = self.source[name]
            if not found.dropped:
                key = (spec.shape, tuple(write.steps for write in found.writes))
                if key in sound:
                    continue
                if tiles(
                    spec.shape, [box for write in found.writes for box in back(write.steps, [whole(write.shape)])]
                ):
                    sound.add(key)
                    continue
            boxes = [box for box, _ in found.dropped]
            for write in found.writes:
                boxes += back(write.steps, [whole(write.shape)])
            if not found.writes and found.dropped and gaps(boxes, spec.shape) == 0:
                self.dropped[name] = found.dropped[0][1].drop
            self._account(name, boxes, spec.shape)

    def _account(self, name: str, boxes: list[Box], shape: tuple[int, ...]) -> None:
        facts: dict[str, Any] = {"source": name, "file": self.source[name].file}
        twice = first_overlap(boxes)
        if twice is not None:
            message = f"{name} is used twice in {_box_text(boxes[twice[0]])} and {_box_text(boxes[twice[1]])}"
            self.problems.append(Problem("remap_overlap", message, **facts))
            return
        unused = gaps(boxes, shape)
        if unused:
            message = f"{unused} of {unused + sum(map(volume, boxes))} elements of {name} are neither used nor dropped"
            self.problems.append(Problem("remap_unused", message, **facts))

    def _keep(self) -> None:
        written = {write.target for write in self.writes}
        for rule in self.rules:
            if not rule.keep or self.converted:
                continue
            pattern = compile_pattern(str(rule.target))
            for name in self.target:
                if pattern.fullmatch(name):
                    self.kept[name] = rule.keep
                    if name in written and not rule.optional:
                        message = f"{name} is kept ({rule.keep}) and written"
                        self.problems.append(Problem("remap_collision", message, rule.label, target=name))

    def _account_targets(self) -> None:
        """Every target element is written once, or kept with a reason."""
        incomplete = self.blamed | {problem.target for problem in self.problems if problem.target}
        by_target: dict[str, list[Write]] = defaultdict(list)
        for write in self.writes:
            by_target[write.target].append(write)
        for name, spec in self.lowering.target.items():
            writes = by_target.get(name, [])
            if name in self.kept and not writes:
                continue
            if not writes:
                if name not in incomplete:
                    message = f"{name} {list(spec.shape)} is not written by any source"
                    self.problems.append(Problem("remap_missing", message, target=name))
                continue
            self.problems += target_problems(name, self.lowering.target, writes, blamed=name in incomplete)


def target_problems(
    name: str, target: Mapping[str, TensorSpec], writes: list[Write], *, blamed: bool = False
) -> list[Problem]:
    """Collisions, overlaps and missing parts of one target.

    Args:
        name: the target.
        target: its manifest.
        writes: all writes to it, joins placed.
        blamed: something else was already said of it, so that a missing part needs no second message.
    """
    spec = target[name]
    if _filled(spec.shape, tuple(write.region if write.join is None else None for write in writes)):
        return []
    places: dict[object, tuple[Box, Write]] = {}
    regions: list[tuple[Box, Write]] = []
    for write in writes:  # the sources of a transform fill one region together
        if write.join is None:
            regions.append((write.region, write))
        else:
            places.setdefault(write.group, (write.region, write))
    regions += places.values()
    twice = first_overlap([region for region, _ in regions])
    if twice is not None:
        (one, first), (other, second) = regions[twice[0]], regions[twice[1]]
        code = "remap_collision" if one == other else "remap_overlap"
        message = f"{first.source} and {second.source} are both written to {name} {_box_text(other)}"
        return [Problem(code, message, second.rule.label, second.source, target=name)]
    missing = gaps([region for region, _ in regions], spec.shape)
    if not missing or blamed:
        return []
    slots = [slot for slot, box in spec.slots.items() if not _covers(box, regions)]
    what = f"slots {', '.join(slots)}" if slots else f"{missing} of {spec.numel} elements"
    sources = ", ".join(write.source for write in writes[:4])
    message = f"{name} lacks {what}; it got {sources}"
    return [Problem("remap_incomplete_group", message, writes[0].rule.label, target=name, missing=tuple(slots))]


@lru_cache(maxsize=8192)
def _filled(shape: Shape, regions: tuple[Box | None, ...]) -> bool:
    """Whether regions fill a shape, each element once; most targets are alike. None: a part of a join."""
    return tiles(shape, [region for region in regions if region is not None]) and None not in regions


def _covers(box: Box, regions: list[tuple[Box, Write]]) -> bool:
    found = [intersection(box, region) for region, _ in regions]
    return sum(volume(common) for common in found if common) == volume(box)


def dead_rules(rules: RuleSet, used: Mapping[int, int], kept: Mapping[str, str]) -> list[Problem]:
    """Rules that matched nothing, choices of which no spelling or more than one was found."""
    problems = []
    choices: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for number, rule in enumerate(rules):
        count = used.get(number, 0)
        if rule.keep:
            count = sum(1 for name in kept if compile_pattern(str(rule.target)).fullmatch(name))
        if rule.variant:
            choice, _, spelling = rule.variant.partition(":")
            choices[choice][spelling] += count
        elif not count and not rule.optional and not rule.fallback:
            problems.append(Problem("remap_dead_rule", f"rule {rule.label} matches nothing", rule.label))
    for choice, spellings in choices.items():
        found = [spelling for spelling, count in spellings.items() if count]
        if not found:
            message = f"no spelling of {choice} is in the checkpoint: {', '.join(spellings)}"
            problems.append(Problem("remap_dead_rule", message))
        elif len(found) > 1:
            message = f"more than one spelling of {choice} is in the checkpoint: {', '.join(found)}"
            problems.append(Problem("remap_ambiguous", message))
        problems += _dead_in_variant(rules, used, choice, found)
    return problems


def _dead_in_variant(rules: RuleSet, used: Mapping[int, int], choice: str, found: list[str]) -> list[Problem]:
    """Rules of the spelling that was found must match like any other."""
    return [
        Problem("remap_dead_rule", f"rule {rule.label} matches nothing", rule.label)
        for number, rule in enumerate(rules)
        if rule.variant in {f"{choice}:{spelling}" for spelling in found} and not used.get(number) and not rule.optional
    ]


def _box_text(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"
