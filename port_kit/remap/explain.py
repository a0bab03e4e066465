"""Why a name goes where it goes: the rules that match it, in words, from the same plan as everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from port_kit.manifest import Manifest
from port_kit.remap.coverage import describe
from port_kit.remap.matching import Matcher
from port_kit.remap.plan import check
from port_kit.remap.problems import nearest
from port_kit.remap.rules import RuleSet


@dataclass
class Explanation:
    """What is to be said of one name.

    Attributes:
        name: the name.
        found: whether any rule or manifest knows it.
        rules: ``{"rule", "groups", "target", "shard", "does"}`` of each rule that matches it as a source.
        writes: what the plan does with it, as source or as target.
        notes: drops, keeps, problems and near names.
    """

    name: str
    found: bool = False
    rules: list[dict[str, Any]] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "found": self.found,
            "rules": self.rules,
            "writes": self.writes,
            "notes": self.notes,
        }

    def to_text(self) -> str:
        lines = [self.name]
        for rule in self.rules:
            lines.append(f"  matches rule {rule['number']}: {rule['rule']}")
            lines.append(f"    groups {rule['groups']}; {rule['does']}")
        return "\n".join([*lines, *(f"  {line}" for line in self.writes + self.notes)])


def explain(
    name: str,
    rules: RuleSet,
    source: Manifest | None = None,
    target: Manifest | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Explanation:
    """Explain a source or target name; with both manifests also what the plan does with its elements."""
    told = Explanation(name)
    _matching(told, rules)
    if source is not None and target is not None:
        _planned(told, rules, source, target, sizes or {})
    known = [*(source or ()), *(target or ())]
    told.found = told.found or name in known
    if not told.found:
        near = nearest(name, known)
        told.notes.append("no rule matches it" + (f"; did you mean {near}?" if near else ""))
    return told


def _matching(told: Explanation, rules: RuleSet) -> None:
    matcher = Matcher(rules.rules)
    for number in matcher.find(told.name):
        rule = rules.rules[number]
        match = matcher.match(number, told.name)
        does = (
            f"dropped: {rule.drop}" if rule.drop else "to " + ", ".join(match.expand(_plain(t)) for t in rule.targets)
        )
        told.rules.append(
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
    told.found = bool(told.rules)


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


def _planned(told: Explanation, rules: RuleSet, source: Manifest, target: Manifest, sizes: Mapping[str, int]) -> None:
    plan = check(rules, source, target, sizes)
    for write in plan.writes:
        if told.name in (write.source, write.target):
            how = describe(write)
            told.writes.append(f"{write.source} -> {write.target}" + (f" [{how}]" if how else ""))
            told.found = True
    for table, word in ((plan.dropped, "dropped"), (plan.kept, "kept")):
        if told.name in table:
            told.notes.append(f"{word}: {table[told.name]}")
            told.found = True
    if plan.converted:
        told.notes.append("the source is already converted: rules are not applied")
    told.notes += [
        f"problem: {problem}" for problem in plan.explained() if told.name in (problem.source, problem.target)
    ]
