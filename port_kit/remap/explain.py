"""Explanation of one name: the rules that match it, and its copy tasks in the plan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from port_kit.manifest import Manifest
from port_kit.remap.coverage import describe
from port_kit.remap.plan import Plan, check
from port_kit.remap.problems import closest_match
from port_kit.remap.resolve import Resolver, expand
from port_kit.remap.rule import Rule, Rules


@dataclass
class Explanation:
    """Explanation of one name.

    Attributes:
        name: the name.
        found: a rule matches it, or it is in a manifest.
        rules: ``{"rule", "groups", "target", "shard", "does"}`` of each rule that matches it as a source.
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
    name: str,
    rules: Rules,
    source: Manifest | None = None,
    target: Manifest | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Explanation:
    """Explain a source or target name; with both manifests, also the tasks of its elements in the plan."""
    result = Explanation(name)
    for number, match in Resolver(rules, {}, sizes or {}).matches(name):
        result.rules.append(_rule_json(number, rules.rules[number], match))
    if source is not None and target is not None:
        _add_plan(result, check(rules, source, target, sizes))
    known = [*(source or ()), *(target or ())]
    result.found = bool(result.rules) or name in known
    if not result.found:
        near = closest_match(name, known)
        result.notes.append("no rule matches it" + (f"; did you mean {near}?" if near else ""))
    return result


def _rule_json(number: int, rule: Rule, match: re.Match[str]) -> dict[str, Any]:
    targets = ", ".join(expand(template, match) for template in rule.targets)
    return {
        "number": number + 1,
        "rule": rule.source,
        "groups": [group or "" for group in match.groups()],
        "shard": rule.shard,
        "ops": [op.to_dict() for op in rule.op],
        "does": f"dropped: {rule.drop}" if rule.drop else f"to {targets}",
        "fallback": rule.fallback,
    }


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
