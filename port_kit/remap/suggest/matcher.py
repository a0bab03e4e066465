"""The search: pairs of units that explain each other best, in rounds.

Round one matches module templates (all layers at once), with fused groups and stacks as further candidates.
Round two matches what is left tensor by tensor, led by what round one found around it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from port_kit.remap.suggest.assign import best_assignment
from port_kit.remap.suggest.groups import virtual_units
from port_kit.remap.suggest.layers import settle
from port_kit.remap.suggest.match import Match
from port_kit.remap.suggest.score import (
    ANCHOR,
    FLOOD,
    NAME,
    RANK,
    Flood,
    Side,
    anchor_score,
    name_score,
)
from port_kit.remap.suggest.shapes import Alignment, align, signature
from port_kit.remap.suggest.units import GROUPINGS, Shape, Unit, has_own_order, units_of

_ITERATIONS = 4


class Search:
    """One round over the units of both sides."""

    def __init__(
        self,
        sources: Sequence[Unit],
        targets: Sequence[Unit],
        *,
        ordered: tuple[bool, bool],
        around: Sequence[Match] = (),
        round_: int = 1,
    ) -> None:
        self.left = Side([*sources, *(leaf for match in around for leaf in match.source.leaves)], ordered=ordered[0])
        self.right = Side([*targets, *(leaf for match in around for leaf in match.target.leaves)], ordered=ordered[1])
        self.known = {match.target: match.source for match in around}
        self.round = round_
        self.sources = [*sources, *virtual_units(sources, targets)]
        self.targets = [*targets, *virtual_units(targets, sources)]
        self.candidates = self._candidates()
        self.static = {pair: self._static(*pair) for pair in self.candidates}
        self.scores: dict[tuple[Unit, Unit], float] = dict(self.static)

    def run(self) -> list[Match]:
        """The assignment after the evidence has flowed between neighbours."""
        assigned = self._assign(self.static)
        for _ in range(_ITERATIONS):
            flood = Flood({**self.known, **assigned}, self.left, self.right)
            self.scores = {
                pair: value + FLOOD * flood.score(*pair) + RANK * flood.rank(*pair)
                for pair, value in self.static.items()
            }
            following = self._assign(self.scores)
            if following == assigned:
                break
            assigned = following
        return [self._match(source, target) for target, source in assigned.items()]

    def _candidates(self) -> dict[tuple[Unit, Unit], Alignment]:
        by_signature: dict[object, list[Unit]] = defaultdict(list)
        for unit in self.sources:
            by_signature[signature(unit)].append(unit)
            if not unit.members:
                by_signature[unit.roles, len(unit.instances[0]), "arity"].append(unit)
        found: dict[tuple[Unit, Unit], Alignment] = {}
        for target in self.targets:
            near = by_signature[signature(target)]
            if not near and not target.members:
                near = by_signature[target.roles, len(target.instances[0]), "arity"]
            for source in near:
                if source.members and target.members:
                    continue
                alignment = align(source, target)
                if alignment is not None:
                    found[source, target] = alignment
        return found

    def _static(self, source: Unit, target: Unit) -> float:
        names = NAME * name_score(source, target, self.left, self.right)
        anchors = ANCHOR * anchor_score(source.leaves[0], target.leaves[0], self.left, self.right)
        return 0.05 + names + anchors - self.candidates[source, target].penalty

    def _assign(self, scores: Mapping[tuple[Unit, Unit], float]) -> dict[Unit, Unit]:
        active = self._active_groups(scores)
        taken = {leaf for group in active for leaf in group.leaves}
        allowed = {
            (source, target): score
            for (source, target), score in scores.items()
            if all(unit in active or not (unit.members or unit in taken) for unit in (source, target))
        }
        return best_assignment(allowed)

    def _active_groups(self, scores: Mapping[tuple[Unit, Unit], float]) -> set[Unit]:
        """Virtual units that explain more than their members would on their own, best first, without overlap."""
        whole: list[tuple[float, Unit, Unit]] = []
        plain: dict[tuple[Unit, Unit], float] = {}
        for (source, target), score in scores.items():
            if source.members:
                whole.append((score, source, target))
            elif target.members:
                whole.append((score, target, source))
            else:
                plain[source, target] = score
        if not whole:
            return set()
        alone: dict[Unit, float] = defaultdict(float)
        for target, source in best_assignment(plain).items():
            alone[source] = alone[target] = plain[source, target]
        active: set[Unit] = set()
        taken: set[Unit] = set()
        for score, group, partner in sorted(whole, key=lambda item: (-item[0], -len(item[1].leaves))):
            members = group.leaves
            if score * len(members) > sum(map(alone.__getitem__, members)) and score > alone[partner]:
                if not taken & {partner, *members}:
                    active.add(group)
                    taken |= {partner, *members}
        return active

    def _match(self, source: Unit, target: Unit) -> Match:
        score = self.scores[source, target]
        rivals = [
            value
            for (other_source, other_target), value in self.scores.items()
            if (other_source is source) != (other_target is target)
        ]
        margin = score - max(rivals) if rivals else 4.0
        name = name_score(source, target, self.left, self.right)
        return Match(source, target, self.candidates[source, target], score, margin, name, self.round)


def match(source: Mapping[str, Shape], target: Mapping[str, Shape]) -> list[Match]:
    """All pairs found between two manifests (name -> shape), in the order of the target."""
    ordered = (has_own_order(source), has_own_order(target))
    found = settle(Search(units_of(source), units_of(target), ordered=ordered).run())
    for round_, grouping in enumerate(GROUPINGS[1:], start=2):
        left, right = _rest(source, found, "source"), _rest(target, found, "target")
        if not left or not right:
            break
        rest = Search(
            units_of(left, grouping),
            units_of(right, grouping),
            ordered=ordered,
            around=found,
            round_=round_,
        )
        found = settle(found + rest.run())
    return sorted(found, key=lambda item: item.target.order)


def _rest(manifest: Mapping[str, Shape], found: Sequence[Match], side: str) -> dict[str, Shape]:
    used: set[str] = set()
    for item in found:
        unit: Unit = getattr(item, side)
        pairs = item.alignment.pairs
        for leaf in unit.leaves:
            for row in leaf.names.values():
                if side == "source" and not unit.members:
                    used.update(row[index] for index in pairs.values())
                else:
                    used.update(row.values())
    return {name: shape for name, shape in manifest.items() if name not in used}
