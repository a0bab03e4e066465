"""Coverage: what a plan does, as a report grouped by layer template, for people and as JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from port_kit.manifest import Manifest
from port_kit.remap.lower import Write
from port_kit.remap.names import collapse, split_numbers
from port_kit.remap.plan import Plan, check
from port_kit.remap.problems import Problem
from port_kit.remap.rules import RuleSet
from port_kit.remap.steps import Call, Cast, Fill, Permute, Reorder, Reshape, Step, Take


@dataclass
class Line:
    """All writes of one layer template: what comes from where, how, and how often."""

    sources: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    how: str = ""
    shape: str = ""
    rule: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "source": collapse(self.sources),
            "target": collapse(dict.fromkeys(self.targets)),
            "how": self.how,
            "shape": self.shape,
            "rule": self.rule,
            "count": len(self.sources),
        }


@dataclass(frozen=True)
class Coverage:
    """A plan's report.

    Attributes:
        plan: the plan, complete or not.
        target_from: where the target came from: ``recorded``, ``built``, ``manifest`` ...
    """

    plan: Plan
    target_from: str = "manifest"

    @property
    def ok(self) -> bool:
        """Whether every element on both sides is accounted for."""
        return self.plan.ok

    def lines(self) -> list[Line]:
        """The writes by layer template, in the order of the sources."""
        found: dict[tuple[str, ...], Line] = {}
        for write in self.plan.writes:
            source, _ = split_numbers(write.source)
            target, _ = split_numbers(write.target)
            how = describe(write)
            shape = str(list(self.plan.source[write.source].shape))
            line = found.setdefault((source, target, how, shape), Line(how=how, shape=shape, rule=write.rule.label))
            line.sources.append(write.source)
            line.targets.append(write.target)
        return list(found.values())

    def problems(self) -> list[dict[str, Any]]:
        """Problems, those of one layer template joined: ``names`` lists sources and targets as templates."""
        groups: dict[tuple[str, str, str, str], list[Problem]] = defaultdict(list)
        for problem in self.plan.explained():
            key = (split_numbers(problem.source)[0], split_numbers(problem.target)[0], problem.code, problem.rule)
            groups[key].append(problem)
        joined = []
        for group in groups.values():
            data: dict[str, Any] = group[0].to_json()
            if len(group) > 1:
                data["count"] = len(group)
                data["sources"] = collapse(problem.source for problem in group if problem.source)
                data["targets"] = collapse(problem.target for problem in group if problem.target)
            joined.append(data)
        return joined

    def to_json(self) -> dict[str, Any]:
        """The report as data."""
        plan = self.plan
        return {
            "ok": plan.ok,
            "rules": {"name": plan.rules.name, "count": len(plan.rules)},
            "converted": plan.converted,
            "source": _side(plan.source) | {"used": len({write.source for write in plan.writes})},
            "target": _side(plan.target) | {"from": self.target_from, "written": self._written()},
            "dropped": dict(plan.dropped),
            "kept": dict(plan.kept),
            "problems": self.problems(),
            "problem_count": len(plan.problems),
            "lines": [line.to_json() for line in self.lines()],
        }

    def _written(self) -> int:
        blamed = {problem.target for problem in self.plan.problems}
        return len({write.target for write in self.plan.writes} - blamed)

    def to_text(self) -> str:
        """The report for people."""
        plan = self.plan
        lines = [
            f"source  {plan.source.origin}: {len(plan.source)} tensors, {plan.source.nbytes:,} bytes",
            f"target  {plan.target.origin} ({self.target_from}): {len(plan.target)} tensors",
            f"rules   {plan.rules.name}: {len(plan.rules)}",
            "",
        ]
        if plan.converted:
            lines.append("the source has the target's names already and passes through unchanged")
        for line in [] if plan.converted else self.lines():
            targets = ", ".join(collapse(dict.fromkeys(line.targets)))
            how = f"  [{line.how}]" if line.how else ""
            lines.append(f"{', '.join(collapse(line.sources))} {line.shape} -> {targets}{how}")
        lines += [f"dropped {name}: {reason}" for name, reason in _by_reason(plan.dropped)]
        lines += [f"kept    {name}: {reason}" for name, reason in _by_reason(plan.kept)]
        lines += ["", *self._verdict()]
        return "\n".join(lines)

    def _verdict(self) -> list[str]:
        if self.ok:
            return [f"complete: all {len(self.plan.source)} sources and {len(self.plan.target)} targets accounted for"]
        lines = [f"{len(self.plan.problems)} problems"]
        for problem in self.problems():
            count = f" (and {problem['count'] - 1} more like it)" if "count" in problem else ""
            near = f" - did you mean {problem['near']}?" if "near" in problem else ""
            file = f" (in {problem['file']})" if "file" in problem else ""
            lines.append(f"  {problem['code'].removeprefix('remap_')}: {problem['message']}{file}{count}{near}")
        return lines


def coverage(
    rules: RuleSet,
    source: Manifest,
    target: Manifest,
    sizes: Mapping[str, int] | None = None,
    *,
    narrow: bool = False,
    target_from: str = "manifest",
) -> Coverage:
    """Check a rule set against a source and a target; never raises for a gap, the report has them all."""
    return Coverage(check(rules, source, target, sizes, narrow=narrow), target_from)


def describe(write: Write) -> str:
    """What happens to a source on its way, in a few words."""
    words = [_step_text(step) for step in write.steps]
    if write.join is not None:
        words.append(f"{write.join.name} as {write.part}")
    if write.slot:
        words.append(f"slot {write.slot}")
    elif write.rule.op and write.rule.op[-1].name == "concat" or write.rule.into:
        words.append("into " + ", ".join(f"{start}:{stop}" for start, stop in write.region))
    return ", ".join(word for word in words if word)


def _step_text(step: Step) -> str:
    if isinstance(step, Take):
        return "take " + ", ".join(f"{start}:{stop}" for start, stop in step.box)
    if isinstance(step, Reshape):
        return f"reshape to {list(step.after)}"
    if isinstance(step, Permute):
        return f"transpose {list(step.perm)}"
    if isinstance(step, Reorder):
        return f"reorder axis {step.dim} as " + ", ".join(f"{start}:{stop}" for start, stop in step.runs)
    if isinstance(step, Cast):
        return f"cast to {step.dtype}"
    if isinstance(step, Fill):
        return f"filled into {list(step.after)}"
    assert isinstance(step, Call)
    return step.name


def _side(manifest: Manifest) -> dict[str, Any]:
    return {"origin": manifest.origin, "tensors": len(manifest), "bytes": manifest.nbytes}


def _by_reason(names: Mapping[str, str]) -> list[tuple[str, str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, reason in names.items():
        groups[reason].append(name)
    return [(text, reason) for reason, group in groups.items() for text in collapse(group)]
