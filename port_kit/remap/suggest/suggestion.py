"""What :func:`port_kit.remap.suggest.suggest` returns: rules with their confidence, and what was left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from port_kit.remap.rules import Rule, RuleSet


@dataclass(frozen=True)
class Proposal:
    """Rules that belong together.

    Attributes:
        rules: one rule, or the rules of one fused target.
        confidence: ``certain`` or ``likely``.
        what: the modules in words, ``blocks.{}.attn.q -> layers.{}.attn.to_q``.
        targets: the target tensors that the rules explain.
        sources: the source tensors that they use or drop.
        doubts: what keeps them from being certain.
    """

    rules: tuple[Rule, ...]
    confidence: str
    what: str
    targets: tuple[str, ...]
    sources: tuple[str, ...]
    doubts: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record in ``--json``."""
        return {
            "confidence": self.confidence,
            "what": self.what,
            "explains": list(self.targets),
            "uses": list(self.sources),
            "doubts": list(self.doubts),
            "rules": [rule.to_dict() for rule in self.rules],
        }


@dataclass(frozen=True)
class Suggestion:
    """A proposed rule set.

    Attributes:
        name: name of the rule set.
        proposals: the proposed rules, in the order of the target.
        missing: target tensors that nothing explains, with the sources that would fit by shape.
    """

    name: str
    proposals: tuple[Proposal, ...]
    missing: Mapping[str, tuple[str, ...]]

    @property
    def rules(self) -> RuleSet:
        """All proposed rules as one set."""
        return RuleSet(self.name, tuple(rule for proposal in self.proposals for rule in proposal.rules))

    def only(self, confidence: str) -> RuleSet:
        """The rules of one confidence."""
        chosen = (proposal for proposal in self.proposals if proposal.confidence == confidence)
        return RuleSet(self.name, tuple(rule for proposal in chosen for rule in proposal.rules))

    def explained(self) -> Counter[str]:
        """Confidence -> number of target tensors."""
        counts: Counter[str] = Counter()
        for proposal in self.proposals:
            counts[proposal.confidence] += len(proposal.targets)
        return counts

    def to_toml(self) -> str:
        """The rule set as TOML; comments give confidence, what each rule explains, and what was left out."""
        head = [f"# {line}" for line in self.report().splitlines()]
        blocks = [f"name = {json.dumps(self.name)}"]
        for proposal in self.proposals:
            blocks.append(_commented(proposal))
        return "\n".join(head) + "\n" + "\n\n".join(blocks) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The whole suggestion for ``--json``."""
        return {
            "name": self.name,
            "proposals": [proposal.to_json() for proposal in self.proposals],
            "missing": {name: list(fitting) for name, fitting in self.missing.items()},
            "targets_explained": dict(self.explained()),
        }

    def report(self) -> str:
        """A summary for people."""
        counts = self.explained()
        dropped = sum(len(proposal.sources) for proposal in self.proposals if not proposal.targets)
        lines = [
            f"{counts['certain']} target tensors explained with certainty, {counts['likely']} likely, "
            f"{len(self.missing)} not explained, {dropped} sources dropped"
        ]
        for name, fitting in self.missing.items():
            lines.append(f"not explained: {name}{_fitting(fitting)}")
        return "\n".join(lines)


def _fitting(names: Iterable[str]) -> str:
    shown = list(names)
    if not shown:
        return " (no unused source has its size)"
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return f" (would fit: {', '.join(shown[:3])}{more})"


def _commented(proposal: Proposal) -> str:
    count = len(proposal.targets) or len(proposal.sources)
    lines = [f"# {proposal.confidence}: {proposal.what} ({count} tensors)"]
    lines += [f"#   {doubt}" for doubt in proposal.doubts]
    body = RuleSet("rules", proposal.rules).to_toml()
    start = body.index("[[rule]]")
    return "\n".join([*lines, body[start:].rstrip()])
