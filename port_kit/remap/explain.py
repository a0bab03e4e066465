"""Explanation of one name: the rules that match it, and its copy tasks in the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from port_kit.manifest import Manifest
from port_kit.remap.coverage import describe
from port_kit.remap.plan import check
from port_kit.remap.problems import closest_match
from port_kit.remap.resolve import Resolver
from port_kit.remap.rule import Rules


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
        return {
            "name": self.name,
            "found": self.found,
            "rules": self.rules,
            "tasks": self.tasks,
            "notes": self.notes,
        }

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
    """Explain a source or target name; with both manifests also what the plan does with its elements."""
    result = Explanation(name)
    _matching(result, rules, sizes or {})
    if source is not None and target is not None:
        _planned(result, rules, source, target, sizes or {})
    known = [*(source or ()), *(target or ())]
    result.found = result.found or name in known
    if not result.found:
        near = closest_match(name, known)
        result.notes.append("no rule matches it" + (f"; did you mean {near}?" if near else ""))
    return result


def _matching(result: Explanation, rules: Rules, sizes: Mapping[str, int]) -> None:
    for number, match in Resolver(rules, {}, sizes).matches(result.name):
        rule = rules.rules[number]
        does = (
            f"dropped: {rule.drop}" if rule.drop else "to " + ", ".join(match.expand(_plain(t)) for t in rule.targets)
        )
        result.rules.append(
            {
                "number": number + 1,
                "rule": rule.source,
                "groups": [group or "" for group in match.groups()],
                "shard": rule.shard,
                "ops": [op.to_dict() for op in rule.op],
                "does": does,
                "fallback": rule.fallback,
            }
        )
    result.found = bool(result.rules)


def _plain(template: str) -> str:
    """A template whose computed numbers stay as they are written, for showing."""
    return "".join(piece.replace("\\", r"\\") if piece.startswith("{") else piece for piece in _pieces(template))


def _pieces(template: str) -> list[str]:
    pieces, rest = [], template
    while "{" in rest:
        before, _, rest = rest.partition("{")
        inside, _, rest = rest.partition("}")
        pieces += [before, "{" + inside + "}"]
    return [*pieces, rest]


def _planned(result: Explanation, rules: Rules, source: Manifest, target: Manifest, sizes: Mapping[str, int]) -> None:
    plan = check(rules, source, target, sizes)
    for task in plan.tasks:
        if result.name in (task.source, task.target):
            how = describe(task)
            result.tasks.append(f"{task.source} -> {task.target}" + (f" [{how}]" if how else ""))
            result.found = True
    for table, word in ((plan.dropped, "dropped"), (plan.kept, "kept")):
        if result.name in table:
            result.notes.append(f"{word}: {table[result.name]}")
            result.found = True
    if plan.converted:
        result.notes.append("the source is already converted: rules are not applied")
    result.notes += [
        f"problem: {problem}" for problem in plan.explained() if result.name in (problem.source, problem.target)
    ]
