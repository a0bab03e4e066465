"""Result of :func:`port_kit.remap.suggest.suggest`: rules with their confidence, and the tensors left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from port_kit.remap.rules import Rule, RuleSet


@dataclass(frozen=True)
class Proposal:
    """Rules that belong together.

    Attributes:
        rules: one rule, or the rules of one fused target.
        confidence: ``certain`` or ``likely``.
        what: the modules as text, ``blocks.{}.attn.q -> layers.{}.attn.to_q``.
        targets: the target tensors that the rules explain.
        sources: the source tensors that they use or drop.
        doubts: reasons against certainty.
    """

    rules: tuple[Rule, ...]
    confidence: str
    what: str
    targets: tuple[str, ...]
    sources: tuple[str, ...]
    doubts: tuple[str, ...] = ()

    def annotated(self) -> Iterator[Rule]:
        """The rules with their confidence and, as a note, their modules and doubts."""
        count = len(self.targets) or len(self.sources)
        note = "; ".join([f"{self.what} ({count} tensors)", *self.doubts])
        for rule in self.rules:
            yield replace(rule, confidence=self.confidence, note=note)

    def to_json(self) -> dict[str, Any]:
        """The record in ``--json``."""
        return {
            "confidence": self.confidence,
            "what": self.what,
            "explains": list(self.targets),
            "uses": list(self.sources),
            "doubts": list(self.doubts),
            "rules": [rule.to_dict() for rule in self.annotated()],
        }


@dataclass(frozen=True)
class Suggestion:
    """A proposed rule set.

    Attributes:
        name: name of the rule set.
        proposals: the proposed rules, in the order of the target.
        missing: target tensors without a match, with the sources that would fit by shape.
        allow_downcast: the sides differ in dtypes, so values may have to be rounded.
        tied: missing targets that may be the same tensor as another target, with that one: embedding and output head.
        scales: sources that no rule reads or drops, because they may be the scales of quantized values.
    """

    name: str
    proposals: tuple[Proposal, ...]
    missing: Mapping[str, tuple[str, ...]]
    allow_downcast: bool = False
    tied: Mapping[str, str] = field(default_factory=dict)
    scales: tuple[str, ...] = ()

    @property
    def rules(self) -> RuleSet:
        """All proposed rules as one set; each carries its confidence and a note."""
        rules = tuple(rule for proposal in self.proposals for rule in proposal.annotated())
        return RuleSet(self.name, rules, allow_downcast=self.allow_downcast)

    def only(self, confidence: str) -> RuleSet:
        """The rules of one confidence."""
        everything = self.rules
        return replace(everything, rules=tuple(rule for rule in everything if rule.confidence == confidence))

    def explained(self) -> Counter[str]:
        """Confidence -> number of target tensors."""
        counts: Counter[str] = Counter()
        for proposal in self.proposals:
            counts[proposal.confidence] += len(proposal.targets)
        return counts

    def to_toml(self) -> str:
        """The rule set as TOML; rules carry their confidence and note, comments list omissions."""
        head = [f"# {line}" for line in self.to_text().splitlines()]
        return "\n".join([*head, "", self.rules.to_toml()])

    def to_json(self) -> dict[str, Any]:
        """The complete suggestion for ``--json``."""
        return {
            "name": self.name,
            "proposals": [proposal.to_json() for proposal in self.proposals],
            "missing": {name: list(fitting) for name, fitting in self.missing.items()},
            "tied": dict(self.tied),
            "scales": list(self.scales),
            "targets_explained": dict(self.explained()),
        }

    def to_text(self) -> str:
        """A summary for people."""
        counts = self.explained()
        dropped = sum(len(proposal.sources) for proposal in self.proposals if not proposal.targets)
        lines = [
            f"{counts['certain']} target tensors explained with certainty, {counts['likely']} likely, "
            f"{len(self.missing)} not explained, {dropped} sources dropped"
        ]
        for name, fitting in self.missing.items():
            twin = f"; keep it if the module ties it to {self.tied[name]}" if name in self.tied else ""
            fits = f"would fit: {_first(fitting)}" if fitting else "no unused source has its size"
            lines.append(f"not explained: {name} ({fits}){twin}")
        if self.scales:
            lines.append(f"neither read nor dropped, may hold quantized values or their scales: {_first(self.scales)}")
        return "\n".join(lines)


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
