"""The search: pairs of units that explain each other best, in rounds.

The first round matches module templates (all layers at once), with fused groups and stacks as further candidates. What
is left is matched again with the innermost lists taken apart, and at last tensor by tensor, each round led by what
the earlier ones found around it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from port_kit.remap.suggest.assign import best_assignment
from port_kit.remap.suggest.entries import entries_of
from port_kit.remap.suggest.groups import folded_units, virtual_units
from port_kit.remap.suggest.layers import settle
from port_kit.remap.suggest.match import NO_RIVAL, Match
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
from port_kit.remap.suggest.units import GROUPINGS, OWN, Shape, Unit, has_own_order, units_of

_ITERATIONS = 4
_WEAK, _WEAK_GROUP, _WEAK_MARGIN = 0.6, 0.9, 0.1  # scores below which a match waits for the next round
_NEEDLESS = 0.4  # what a transposition costs that the counts of shapes do not ask for


@dataclass(frozen=True)
class _Half:
    """One manifest in one round: the units still to be matched, and those that earlier rounds have used."""

    free: list[Unit]
    done: list[Unit]
    ordered: bool

    @classmethod
    def of(cls, manifest: Mapping[str, Shape], used: Container[str], grouping: str) -> _Half:
        """Group the used and the unused tensors of a manifest, each by themselves."""
        free = {name: shape for name, shape in manifest.items() if name not in used}
        done = {name: shape for name, shape in manifest.items() if name in used}
        return cls(units_of(free, grouping), units_of(done, grouping), has_own_order(manifest))


class Search:
    """One round over the units of both sides."""

    def __init__(
        self,
        left: _Half,
        right: _Half,
        known: Sequence[tuple[Unit, Unit, float]] = (),
        round_: int = 1,
    ) -> None:
        sources, targets = left.free, right.free
        ordered = left.ordered and right.ordered  # an order is compared with an order of the same kind
        self.left = Side([*sources, *left.done], ordered=ordered)
        self.right = Side([*targets, *right.done], ordered=ordered)
        self.left_shapes, self.right_shapes = _matrices(self.left.units), _matrices(self.right.units)
        self.known = known
        self.round = round_
        self.sources = [*sources, *virtual_units(sources, targets), *folded_units(sources, targets)]
        self.targets = [*targets, *virtual_units(targets, sources)]
        self.candidates = self._candidates()
        self.static = {pair: self._static(*pair) for pair in self.candidates}
        self.scores: dict[tuple[Unit, Unit], float] = dict(self.static)

    def run(self) -> list[Match]:
        """The assignment after the evidence has flowed between neighbours."""
        assigned = self._assign(self.static)
        for _ in range(_ITERATIONS):
            flood = Flood(assigned, self.known, self.left, self.right)
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
                if alignment is not None and (source.kind != "fold" or alignment.relation == "copy"):
                    found[source, target] = alignment
        return found

    def _static(self, source: Unit, target: Unit) -> float:
        names = NAME * name_score(source, target, self.left, self.right)
        anchors = ANCHOR * anchor_score(source.leaves[0], target.leaves[0], self.left, self.right)
        needless = _NEEDLESS if self._turns_needlessly(source, target) else 0.0
        return 0.05 + names + anchors - self.candidates[source, target].penalty - needless

    def _turns_needlessly(self, source: Unit, target: Unit) -> bool:
        """Whether a plain matrix would be transposed although both sides have as many of each shape.

        Where the two sides call their tensors otherwise (``kernel``, ``weight``) that many may well be turned.
        """
        if self.candidates[source, target].relation != "transpose" or source.roles != (OWN,):
            return False
        pair = [next(iter(unit.leaves[0].shapes[OWN].values())) for unit in (source, target)]
        if source.members or target.members or _tensor_name(source) != _tensor_name(target):
            return False
        return all(self.left_shapes[shape] == self.right_shapes[shape] for shape in pair)

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
        pair = (source, target)
        rivals = [other for other in self.scores if (other[0] is source) != (other[1] is target)]
        score, name = self.scores[pair], self._name(pair)
        return Match(
            source,
            target,
            self.candidates[pair],
            score,
            score - max(self.scores[other] for other in rivals) if rivals else NO_RIVAL,
            name,
            name - max(map(self._name, rivals)) if rivals else NO_RIVAL,
            self.round,
        )

    def _name(self, pair: tuple[Unit, Unit]) -> float:
        return name_score(*pair, self.left, self.right, numbers=False)


def _matrices(units: Iterable[Unit]) -> Counter[Shape]:
    """How many matrices of each shape there are."""
    return Counter(shape for unit in units for shape in unit.shapes.get(OWN, {}).values() if len(shape) == 2)


def _tensor_name(unit: Unit) -> str:
    """What the first tensor of a unit is called in its module."""
    return next(iter(unit.names[OWN].values())).rpartition(".")[2]


def match(source: Mapping[str, Shape], target: Mapping[str, Shape]) -> list[Match]:
    """All pairs found between two manifests (name -> shape), in the order of the target."""
    found: list[Match] = []
    for round_, grouping in enumerate(GROUPINGS, start=1):
        links = [(name, entry["from"]) for item in found for name, entry in entries_of(item)]
        used = {name for _, names in links for name in names}, {name for name, _ in links}
        if used[0] >= set(source) or used[1] >= set(target):
            break
        left, right = _Half.of(source, used[0], grouping), _Half.of(target, used[1], grouping)
        search = Search(left, right, _known(links, left.done, right.done), round_)
        last = grouping == GROUPINGS[-1]
        found = settle([*found, *(item for item in search.run() if last or not _premature(item))])
    return sorted(found, key=lambda item: item.target.order)


def _premature(item: Match) -> bool:
    """Whether a match is so weak that a later, finer round should look again."""
    fused = bool(item.source.members or item.target.members)
    return item.score < (_WEAK_GROUP if fused else _WEAK) and item.margin < _WEAK_MARGIN


def _known(
    links: Iterable[tuple[str, Sequence[str]]], sources: Sequence[Unit], targets: Sequence[Unit]
) -> list[tuple[Unit, Unit, float]]:
    """What earlier rounds found, in the units of this one: (source, target, share)."""
    owner = {name: unit for unit in [*sources, *targets] for row in unit.names.values() for name in row.values()}
    votes: dict[tuple[Unit, Unit], int] = defaultdict(int)
    total: dict[Unit, int] = defaultdict(int)
    for name, origins in links:
        for origin in origins:
            votes[owner[origin], owner[name]] += 1
            total[owner[name]] += 1
    return [(source, target, count / total[target]) for (source, target), count in votes.items()]
