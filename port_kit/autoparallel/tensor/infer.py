"""Inference of tensor parallelism for a subject: the blocks of three configurations, generalized to rules.

Each kind of block is analyzed at the tiny configuration, with more heads, and wider. Sizes that differ between them
become expressions over attributes. A rule is kept if it explains all three.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from os.path import commonprefix
from typing import Any

from torch import nn

from port_kit.autoparallel.observe import block_paths
from port_kit.autoparallel.plan import (
    ChannelRule,
    DividedValue,
    LinearPlan,
    NormPlan,
    Refusal,
    TablePlan,
    UnitGroup,
)
from port_kit.autoparallel.subject import ModelScale, Subject, TokenScale
from port_kit.autoparallel.tensor.analyze import BlockSplit, analyze_block
from port_kit.autoparallel.tensor.blocks import Arguments, BlockCalls, is_linear, observe_blocks, structure
from port_kit.autoparallel.tensor.divided import Place, index_of
from port_kit.autoparallel.tensor.groups import Segment
from port_kit.autoparallel.tensor.sizes import fit, numbers
from port_kit.autoparallel.tensor.trial import record
from port_kit.autoparallel.tensor.values import Number, run_trials

#: Configurations that rules must explain; the first is the tiny one.
SCALES = (ModelScale(), ModelScale(heads=2), ModelScale(width=2))
#: Linears whose rows do not grow from the first to the second process no tokens.
_FEW, _MANY = TokenScale(), TokenScale(image=1, text=1, audio=1)


@dataclass
class TensorSections:
    """The sections of a plan that tensor parallelism reads."""

    units: list[UnitGroup] = field(default_factory=list)
    linears: list[LinearPlan] = field(default_factory=list)
    norms: list[NormPlan] = field(default_factory=list)
    tables: list[TablePlan] = field(default_factory=list)
    divided: list[DividedValue] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)

    def extend(self, other: TensorSections) -> None:
        """Add the entries of another kind of block that are not here yet."""
        for name in vars(self):
            own = getattr(self, name)
            own += [entry for entry in getattr(other, name) if entry not in own]


@dataclass
class _Seen:
    """One kind of block in one configuration."""

    path: str
    block: nn.Module
    given: Arguments
    split: BlockSplit
    table: Mapping[str, int]


def infer_tensor_parallelism(subject: Subject) -> TensorSections:
    """Infer the sections of a plan for tensor parallelism."""
    models = [subject.build(scale) for scale in SCALES]
    observed = [observe_blocks(m, subject.inputs(_FEW, s)) for m, s in zip(models, SCALES, strict=True)]
    whole: dict[str, set[str]] = {}
    while True:
        kinds: dict[Any, list[_Seen]] = {}
        for model, calls in zip(models, observed, strict=True):
            for key, seen in _analyze(model, calls, set(kinds) if model is not models[0] else None, whole).items():
                kinds.setdefault(key, []).append(seen)
        conflicts = _conflicts(kinds)
        if all(modules <= whole.get(pattern, set()) for pattern, modules in conflicts.items()):
            break
        for pattern, modules in conflicts.items():
            whole.setdefault(pattern, set()).update(modules)
    sections = TensorSections()
    for configurations in kinds.values():
        _merge(sections, _sections(configurations))
    more = observe_blocks(models[0], subject.inputs(_MANY, SCALES[0]))
    _add_gathered(sections, models[0], observed[0].rows, more.rows)
    return sections


def _analyze(
    model: nn.Module, calls: BlockCalls, wanted: set[Any] | None, whole: Mapping[str, set[str]]
) -> dict[Any, _Seen]:
    """Analyze the first block of each structure; with ``wanted``, only of these structures."""
    found: dict[Any, _Seen] = {}
    for path, given in calls.first.items():
        block, pattern = model.get_submodule(path), block_pattern(path)
        key = pattern, structure(block)
        if key in found or wanted is not None and key not in wanted:
            continue
        skip = {name[len(path) + 1 :] for name in calls.outside if name.startswith(f"{path}.")}
        split = analyze_block(block, given, skip, whole.get(pattern, ()))
        found[key] = _Seen(path, block, given, split, numbers(block))
    return found


def _conflicts(kinds: Mapping[Any, Sequence[_Seen]]) -> dict[str, set[str]]:
    """Return, per list of blocks, the linears that its kinds of blocks do not split in the same way."""
    roles: dict[tuple[str, str], set[str]] = {}
    for (pattern, _), configurations in kinds.items():
        first = configurations[0]
        split = {side.module: side.kind for side in first.split.groups.sides}
        for path, module in first.block.named_modules():
            if is_linear(module) and path in first.split.used:
                roles.setdefault((pattern, path), set()).add(split.get(path, "whole"))
    found: dict[str, set[str]] = {}
    for (pattern, path), each in roles.items():
        if len(each) > 1:
            found.setdefault(pattern, set()).add(path)
    return found


def block_pattern(path: str) -> str:
    """Return the pattern of a block: an index at its end becomes ``*``."""
    parent, _, last = path.rpartition(".")
    return f"{parent}.*" if last.isdigit() and parent else path


def _sections(seen: Sequence[_Seen]) -> TensorSections:
    """Return the sections of one kind of block."""
    first = seen[0]
    pattern = block_pattern(first.path)
    sections = TensorSections()
    reasons = sorted({reason for one in seen for reason in one.split.refused})
    sections.refused = [Refusal(kind="tensor", reason=f"{pattern}: {reason}") for reason in reasons]
    if len(seen) < len(SCALES) or len({_shape(one.split) for one in seen}) > 1:
        if first.split.groups.sides:
            reason = f"{pattern}: the split differs between configurations"
            sections.refused.append(Refusal(kind="tensor", reason=reason))
        return sections
    writer = _Writer(seen, pattern)
    try:
        writer.write(sections)
    except _NoRule as error:
        return TensorSections(refused=[*sections.refused, Refusal(kind="tensor", reason=f"{pattern}: {error}")])
    return sections


def _shape(split: BlockSplit) -> Any:
    """Return what must be equal in all configurations: which sides and axes are split by which groups."""
    groups = split.groups
    sides = [(side, _runs(segments)) for side, segments in groups.sides.items()]
    axes = [(axis, _runs(segments)) for axis, segments in groups.axes.items()]
    return tuple(sorted(map(repr, sides))), tuple(sorted(map(repr, axes)))


def _runs(segments: Sequence[Segment]) -> tuple[tuple[int, int], ...]:
    """Return ``(group, number of consecutive segments)``: segments of a group and one size are one rule."""
    runs = [(key, len(list(items))) for key, items in groupby(segments, key=lambda s: (s.group, s.size))]
    return tuple((group, count) for (group, _), count in runs)


class _NoRule(Exception):
    """No expression gives a size in all configurations."""


class _Writer:
    """Writes the sections of one kind of block."""

    def __init__(self, seen: Sequence[_Seen], pattern: str) -> None:
        self.seen, self.pattern = seen, pattern
        self.tables = [one.table for one in seen]
        self.groups = seen[0].split.groups
        self.names = self._names()

    def write(self, sections: TensorSections) -> None:
        for group, name in self.names.items():
            sections.units.append(self._unit(group, name))
        for side, segments in self.groups.sides.items():
            module = self._module(side.module)
            rules = self._rules(segments, [one.split.groups.sides[side] for one in self.seen], side.module)
            if side.kind == "norm":
                kind = self.seen[0].split.norms[side.module]
                sections.norms.append(NormPlan(module=module, kind=kind, channels=rules))
            else:
                role = "column" if side.kind == "out" else "row"
                sections.linears.append(LinearPlan(module=module, role=role, channels=rules))  # type: ignore[arg-type]
        for axis, segments in self.groups.axes.items():
            rules = self._rules(segments, [one.split.groups.axes[axis] for one in self.seen], "")
            sections.tables.append(self._table(axis, rules))
        sections.divided += [
            DividedValue(module=self._module(n.module), attribute=n.attribute, index=index_of(n.place))
            for n in self._values()
        ]

    def _module(self, path: str) -> str:
        return f"{self.pattern}.{path}" if path else self.pattern

    def _names(self) -> dict[int, str]:
        """Name each group after its block list and the module that its linears have in common."""
        modules: dict[int, list[str]] = {}
        for side, segments in self.groups.sides.items():
            for segment in segments:
                modules.setdefault(segment.group, []).append(side.module)
        names: dict[int, str] = {}
        base = self.pattern.removesuffix(".*")
        for group in sorted(modules):
            own = [m for m in modules[group] if len({s.group for s in self._segments_of(m)}) == 1] or modules[group]
            common = _common_module(own)
            name = f"{base}.{common}" if common else base
            taken = Counter(names.values())
            names[group] = name if not taken[name] else f"{name}.{own[0].rpartition('.')[2]}"
        return names

    def _segments_of(self, module: str) -> list[Segment]:
        return [s for side, segments in self.groups.sides.items() if side.module == module for s in segments]

    def _unit(self, group: int, name: str) -> UnitGroup:
        counts = [one.split.groups.counts[group] for one in self.seen]
        near = name.removeprefix(self.pattern.removesuffix(".*")).lstrip(".")
        found = fit(counts, self.tables, f"{near}.x")
        if not found:
            raise _NoRule(f"no expression gives {counts} units of {name}")
        return UnitGroup(name=name, block=self.pattern, count=found[0], mixes_tokens=group in self.seen[0].split.mixing)

    def _rules(
        self, segments: Sequence[Segment], everywhere: Sequence[Sequence[Segment]], near: str
    ) -> tuple[ChannelRule, ...]:
        runs = _runs(segments)
        if len(runs) == 1:
            return (ChannelRule(units=self.names[runs[0][0]], repeat=runs[0][1]),)
        rules, at = [], 0
        for group, repeat in runs:
            sizes = [each[at].size for each in everywhere]
            found = fit(sizes, self.tables, near)
            if not found:
                raise _NoRule(f"no expression gives the sizes {sizes} of a part of {near}")
            rules.append(ChannelRule(units=self.names[group], size=found[0], repeat=repeat))
            at += repeat
        return tuple(rules)

    def _table(self, axis: Any, rules: tuple[ChannelRule, ...]) -> TablePlan:
        if axis.kind == "parameter":
            module, _, leaf = axis.name.rpartition(".")
            return TablePlan(module=self._module(module), path=leaf, kind="parameter", dim=axis.dim, channels=rules)
        return TablePlan(module=self.pattern, path=axis.name, kind="argument", dim=axis.dim, channels=rules)

    def _values(self) -> tuple[Number, ...]:
        """Return the numbers to divide that are correct in all configurations."""
        choices = dict.fromkeys(tuple((n.module, n.attribute, n.place) for n in one.split.values) for one in self.seen)
        for choice in choices:
            if all(map(lambda one, choice=choice: _correct(one, choice), self.seen)):  # type: ignore[misc]
                return tuple(Number(module, attribute, place, 0) for module, attribute, place in choice)
        raise _NoRule(f"no set of divided values is correct in all configurations: {list(choices)}")


def _common_module(paths: Sequence[str]) -> str:
    parts = commonprefix([path.split(".")[:-1] for path in paths])
    return ".".join(parts)


def _correct(seen: _Seen, choice: Sequence[tuple[str, str, Place]]) -> bool:
    """Return True if dividing these numbers is correct for 2 ranks, and for as many as there are units."""
    groups = seen.split.groups
    recording = record(seen.block, seen.given, groups)
    chosen = [Number(module, attribute, place, 0) for module, attribute, place in choice]
    most = min(groups.counts, default=1)
    degrees = [ranks for ranks in (2, 4) if most % ranks == 0]
    return all(run_trials(seen.block, seen.given, groups, recording, chosen, ranks) is None for ranks in degrees)


def _merge(sections: TensorSections, more: TensorSections) -> None:
    """Add the sections of a kind of block; kinds of one list must not contradict each other."""
    known = _by_name(sections)
    clashes = [name for name, entry in _by_name(more).items() if known.get(name, entry) != entry]
    if clashes:
        reason = f"blocks of one list differ in {', '.join(sorted(set(clashes)))}"
        sections.refused.append(Refusal(kind="tensor", reason=reason))
        return
    sections.extend(more)


def _by_name(sections: TensorSections) -> dict[str, Any]:
    linears: dict[str, Any] = {entry.module: entry for entry in sections.linears}
    norms = {entry.module: entry for entry in sections.norms}
    return {**linears, **norms, **{f"units {entry.name}": entry for entry in sections.units}}


def _add_gathered(sections: TensorSections, model: nn.Module, few: Mapping[str, int], many: Mapping[str, int]) -> None:
    """Gather the outputs of linears that process no tokens, such as those of modulations."""
    patterns = {entry.module for entry in sections.linears}
    blocks = block_paths(model)
    for path, rows in few.items():
        module = model.get_submodule(path)
        pattern = next((f"{block_pattern(b)}{path[len(b) :]}" for b in blocks if path.startswith(f"{b}.")), path)
        if isinstance(module, nn.Linear) and many.get(path) == rows and pattern not in patterns:
            patterns.add(pattern)
            sections.linears.append(LinearPlan(module=pattern, role="gathered"))
