"""Reports as text and as JSON: the coverage of a plan by layer template, and the explanation of one name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from port_kit.manifest import Manifest
from port_kit.remap.names import collapse, template_of
from port_kit.remap.plan import Plan, check, grouped
from port_kit.remap.problems import Problem, closest_match
from port_kit.remap.resolve import CopyTask, Resolver, expand
from port_kit.remap.rule import Rules, Sizes
from port_kit.remap.tensor_ops import Call, Cast, Fill, Permute, Reorder, Reshape, Slice, TensorOp


@dataclass(frozen=True)
class Coverage:
    """The report of a plan.

    Attributes:
        plan: the plan, complete or not.
        target_from: origin of the target: ``recorded``, ``built``, ``manifest`` ...
        target_config: configuration of the target: a file, ``full size``, or empty for a manifest.
    """

    plan: Plan
    target_from: str = "manifest"
    target_config: str = ""

    @property
    def ok(self) -> bool:
        """Return True if every element on both sides is accounted for."""
        return self.plan.ok

    def lines(self) -> list[dict[str, Any]]:
        """Return the tasks by layer template, in the order of the sources."""

        def key(task: CopyTask) -> tuple[str, ...]:
            shape = str(list(self.plan.source[task.source].shape))
            return template_of(task.source), template_of(task.target), describe(task), shape

        return [
            {
                "source": collapse(task.source for task in tasks),
                "target": collapse(dict.fromkeys(task.target for task in tasks)),
                "how": how,
                "shape": shape,
                "rule": tasks[0].rule.label,
                "count": len(tasks),
            }
            for (_, _, how, shape), tasks in grouped(self.plan.tasks, key).items()
        ]

    def problems(self) -> list[dict[str, Any]]:
        """Return the problems, those of one layer template joined, with their sources and targets as templates."""

        def key(problem: Problem) -> tuple[str, ...]:
            return template_of(problem.source), template_of(problem.target), problem.code, problem.rule

        joined = []
        for group in grouped(self.plan.explained(), key).values():
            data: dict[str, Any] = group[0].to_json()
            if len(group) > 1:
                data["count"] = len(group)
                data["sources"] = collapse(problem.source for problem in group if problem.source)
                data["targets"] = collapse(problem.target for problem in group if problem.target)
            joined.append(data)
        return joined

    def to_json(self) -> dict[str, Any]:
        """Return the report as data."""
        plan = self.plan
        written = {task.target for task in plan.tasks} - {problem.target for problem in plan.problems}
        return {
            "ok": plan.ok,
            "rules": {"name": plan.rules.name, "count": len(plan.rules)},
            "converted": plan.converted,
            "source": _side(plan.source) | {"used": len({task.source for task in plan.tasks})},
            "target": _side(plan.target)
            | {"from": self.target_from, "config": self.target_config, "written": len(written)},
            "dropped": dict(plan.dropped),
            "kept": dict(plan.kept),
            "problems": self.problems(),
            "problem_count": len(plan.problems),
            "lines": self.lines(),
        }

    def to_text(self) -> str:
        """Return the report as text."""
        plan = self.plan
        origin = ", ".join(filter(None, (self.target_from, self.target_config)))
        lines = [
            f"source  {plan.source.origin}: {len(plan.source)} tensors, {plan.source.nbytes:,} bytes",
            f"target  {plan.target.origin} ({origin}): {len(plan.target)} tensors",
            f"rules   {plan.rules.name}: {len(plan.rules)}",
            "",
        ]
        if plan.converted:
            lines.append("the source has the target's names: rules are not applied")
        for line in [] if plan.converted else self.lines():
            how = f"  [{line['how']}]" if line["how"] else ""
            lines.append(f"{', '.join(line['source'])} {line['shape']} -> {', '.join(line['target'])}{how}")
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
    rules: Rules,
    source: Manifest,
    target: Manifest,
    sizes: Sizes | None = None,
    *,
    allow_downcast: bool = False,
    target_from: str = "manifest",
    target_config: str = "",
) -> Coverage:
    """Check rules against a source and a target; gaps are reported, not raised."""
    return Coverage(check(rules, source, target, sizes, allow_downcast=allow_downcast), target_from, target_config)


_TEXTS: dict[type[TensorOp], Callable[[Any], str]] = {
    Slice: lambda op: "take " + ", ".join(f"{start}:{stop}" for start, stop in op.region),
    Reshape: lambda op: f"reshape to {list(op.after)}",
    Permute: lambda op: f"transpose {list(op.perm)}",
    Reorder: lambda op: f"reorder axis {op.dim} as " + ", ".join(f"{start}:{stop}" for start, stop in op.runs),
    Cast: lambda op: f"cast to {op.dtype}",
    Fill: lambda op: f"filled into {list(op.after)}",
    Call: lambda op: op.name,
}


def describe(task: CopyTask) -> str:
    """Return the operations on a source in a few words."""
    words = [_TEXTS[type(op)](op) for op in task.ops]
    if task.join is not None:
        words.append(f"{task.join.name} as {task.role}")
    if task.shard:
        words.append(f"shard {task.shard}")
    elif task.rule.op and task.rule.op[-1].name == "concat" or task.rule.into:
        words.append("into " + ", ".join(f"{start}:{stop}" for start, stop in task.region))
    return ", ".join(word for word in words if word)


def _side(manifest: Manifest) -> dict[str, Any]:
    return {"origin": manifest.origin, "tensors": len(manifest), "bytes": manifest.nbytes}


def _by_reason(names: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(text, reason) for reason, group in grouped(names, names.get).items() for text in collapse(group)]


@dataclass
class Explanation:
    """Explanation of one name.

    Attributes:
        found: a rule matches it, or it is in a manifest.
        rules: number, pattern, groups and effect of each rule that matches it as a source.
        tasks: its copy tasks, as source or as target.
        notes: drops, keeps, problems and similar names.
    """

    name: str
    found: bool = False
    rules: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        lines = [self.name]
        for rule in self.rules:
            lines.append(f"  matches rule {rule['number']}: {rule['rule']}")
            lines.append(f"    groups {rule['groups']}; {rule['does']}")
        return "\n".join([*lines, *(f"  {line}" for line in self.tasks + self.notes)])


def explain(
    name: str, rules: Rules, source: Manifest | None = None, target: Manifest | None = None, sizes: Sizes | None = None
) -> Explanation:
    """Explain a source or target name; with both manifests, also the tasks of its elements in the plan."""
    result = Explanation(name)
    for number, match in Resolver(rules, {}, sizes or {}).matches(name):
        rule = rules.rules[number]
        targets = ", ".join(expand(template, match) for template in rule.targets)
        result.rules.append(
            {
                "number": number + 1,
                "rule": rule.source,
                "groups": [group or "" for group in match.groups()],
                "shard": rule.shard,
                "ops": [op.to_dict() for op in rule.op],
                "does": f"dropped: {rule.drop}" if rule.drop else f"to {targets}",
                "fallback": rule.fallback,
            }
        )
    if source is not None and target is not None:
        _add_plan(result, check(rules, source, target, sizes))
    known = [*(source or ()), *(target or ())]
    result.found = bool(result.rules) or name in known
    if not result.found:
        near = closest_match(name, known)
        result.notes.append("no rule matches it" + (f"; did you mean {near}?" if near else ""))
    return result


def _add_plan(result: Explanation, plan: Plan) -> None:
    for task in plan.tasks:
        if result.name in (task.source, task.target):
            how = describe(task)
            result.tasks.append(f"{task.source} -> {task.target}" + (f" [{how}]" if how else ""))
    for table, word in ((plan.dropped, "dropped"), (plan.kept, "kept")):
        if result.name in table:
            result.notes.append(f"{word}: {table[result.name]}")
    if plan.converted:
        result.notes.append("the source is already converted: rules are not applied")
    for problem in plan.explained():
        if result.name in (problem.source, problem.target):
            result.notes.append(f"problem: {problem}")
