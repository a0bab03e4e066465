"""The search for the pairs of groups that explain each other best, in rounds.

The first round matches module templates (all layers at once), with fused groups and stacks as further candidates. The
rest is matched again with the innermost lists split, and at last tensor by tensor. Each round uses the matches of the
earlier ones.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from port_kit.manifest import TensorSpec
from port_kit.remap.suggest.alignment import Alignment, alignments, signature
from port_kit.remap.suggest.assignment import best_assignment
from port_kit.remap.suggest.layer_order import resolve_layer_order
from port_kit.remap.suggest.match import NO_RIVAL, Match
from port_kit.remap.suggest.module_groups import GROUPINGS, WEIGHT, ModuleGroup, Shape, group_modules, has_own_order
from port_kit.remap.suggest.number_kinds import number_kinds
from port_kit.remap.suggest.scores import (
    NAME_WEIGHT,
    NEIGHBOR_WEIGHT,
    ORDER_WEIGHT,
    SAME_PATH_WEIGHT,
    SIZE_WEIGHT,
    Link,
    ManifestView,
    NeighborScores,
    has_same_path,
    name_score,
    size_score,
)
from port_kit.remap.suggest.virtual_groups import virtual_groups, weight_norm_groups

_ITERATIONS = 4
_NEEDLESS_TRANSPOSE = 0.4  # cost of a transposition that the counts of shapes do not require


@dataclass(frozen=True)
class _RoundManifest:
    """One manifest in one round: the groups still to be matched, and those that earlier rounds have used."""

    free: list[ModuleGroup]
    done: list[ModuleGroup]
    ordered: bool
    kinds: Mapping[str, str]

    @classmethod
    def of(cls, manifest: Mapping[str, TensorSpec], used: Container[str], grouping: str) -> _RoundManifest:
        """Group the used and the unused tensors of a manifest, each by themselves."""
        free = {name: spec.shape for name, spec in manifest.items() if name not in used}
        done = {name: spec.shape for name, spec in manifest.items() if name in used}
        groups = group_modules(free, grouping), group_modules(done, grouping)
        return cls(*groups, has_own_order(manifest), number_kinds(manifest))


class Search:
    """One round over the groups of both sides."""

    def __init__(
        self,
        left: _RoundManifest,
        right: _RoundManifest,
        known: Sequence[Link] = (),
    ) -> None:
        sources, targets = left.free, right.free
        ordered = left.ordered and right.ordered  # an order is compared with an order of the same kind
        self.left = ManifestView([*sources, *left.done], ordered=ordered)
        self.right = ManifestView([*targets, *right.done], ordered=ordered)
        self.left_shapes, self.right_shapes = _matrices(self.left.groups), _matrices(self.right.groups)
        self.known = known
        self.sources = [*sources, *virtual_groups(sources, targets), *weight_norm_groups(sources, targets)]
        self.targets = [*targets, *virtual_groups(targets, sources)]
        self.kinds = {
            group: {manifest.kinds[name] for name in group.tensor_names()}
            for groups, manifest in ((self.sources, left), (self.targets, right))
            for group in groups
        }
        self.candidates = self._candidates()
        self.static = {pair: self._static(*pair) for pair in self.candidates}
        self.scores: dict[tuple[ModuleGroup, ModuleGroup], float] = dict(self.static)

    def run(self) -> list[Match]:
        """The assignment after the evidence has flowed between neighbors."""
        assigned = self._assign(self.static)
        for _ in range(_ITERATIONS):
            links = [
                (source, target, 1 / max(len(source.leaves), len(target.leaves))) for target, source in assigned.items()
            ]
            neighbors = NeighborScores([*self.known, *links], self.left, self.right)
            self.scores = {
                pair: value + NEIGHBOR_WEIGHT * neighbors.score(*pair) + ORDER_WEIGHT * neighbors.order_score(*pair)
                for pair, value in self.static.items()
            }
            following = self._assign(self.scores)
            if following == assigned:
                break
            assigned = following
        return [self._match(source, target) for target, source in assigned.items()]

    def _candidates(self) -> dict[tuple[ModuleGroup, ModuleGroup], Alignment]:
        by_signature: dict[object, list[ModuleGroup]] = defaultdict(list)
        for group in self.sources:
            by_signature[signature(group)].append(group)
            if not group.members:
                by_signature[group.roles, len(group.instances[0]), "arity"].append(group)
        found: dict[tuple[ModuleGroup, ModuleGroup], Alignment] = {}
        for target in self.targets:
            near = by_signature[signature(target)]
            if not near and not target.members:
                near = by_signature[target.roles, len(target.instances[0]), "arity"]
            for source in near:
                if source.members and target.members or self.kinds[source] != self.kinds[target]:
                    continue
                alignment = next(alignments(source, target), None)
                if alignment is not None and (source.kind != "weight_norm" or alignment.relation == "copy"):
                    found[source, target] = alignment
        return found

    def _static(self, source: ModuleGroup, target: ModuleGroup) -> float:
        names = NAME_WEIGHT * name_score(source, target)
        sizes = SIZE_WEIGHT * size_score(source.leaves[0], target.leaves[0], self.left, self.right)
        needless = _NEEDLESS_TRANSPOSE if self._transposes_needlessly(source, target) else 0.0
        names += SAME_PATH_WEIGHT * has_same_path(source, target)
        return 0.05 + names + sizes - self.candidates[source, target].penalty - needless

    def _transposes_needlessly(self, source: ModuleGroup, target: ModuleGroup) -> bool:
        """Return True if a plain matrix would be transposed although both sides have as many of each shape.

        If the parameter names differ (``kernel``, ``weight``), all matrices may well be transposed.
        """
        if self.candidates[source, target].relation != "transpose" or source.roles != (WEIGHT,):
            return False
        pair = [next(iter(group.leaves[0].shapes[WEIGHT].values())) for group in (source, target)]
        if source.members or target.members:
            return False
        if len({group.first_name(WEIGHT).rpartition(".")[2] for group in (source, target)}) > 1:
            return False
        return all(self.left_shapes[shape] == self.right_shapes[shape] for shape in pair)

    def _assign(self, scores: Mapping[tuple[ModuleGroup, ModuleGroup], float]) -> dict[ModuleGroup, ModuleGroup]:
        active = self._active_groups(scores)
        taken = {leaf for group in active for leaf in group.leaves}
        allowed = {
            (source, target): score
            for (source, target), score in scores.items()
            if all(group in active or not (group.members or group in taken) for group in (source, target))
        }
        return best_assignment(allowed)

    def _active_groups(self, scores: Mapping[tuple[ModuleGroup, ModuleGroup], float]) -> set[ModuleGroup]:
        """Virtual groups that explain more than their members would on their own, best first, without overlap."""
        whole: list[tuple[float, ModuleGroup, ModuleGroup]] = []
        plain: dict[tuple[ModuleGroup, ModuleGroup], float] = {}
        for (source, target), score in scores.items():
            if source.members:
                whole.append((score, source, target))
            elif target.members:
                whole.append((score, target, source))
            else:
                plain[source, target] = score
        if not whole:
            return set()
        alone: dict[ModuleGroup, float] = defaultdict(float)
        for target, source in best_assignment(plain).items():
            alone[source] = alone[target] = plain[source, target]
        active: set[ModuleGroup] = set()
        taken: set[ModuleGroup] = set()
        for score, group, partner in sorted(whole, key=lambda item: (-item[0], -len(item[1].leaves))):
            members = group.leaves
            if score * len(members) > sum(map(alone.__getitem__, members)) and score > alone[partner]:
                if not taken & {partner, *members}:
                    active.add(group)
                    taken |= {partner, *members}
        return active

    def _match(self, source: ModuleGroup, target: ModuleGroup) -> Match:
        pair = (source, target)
        rivals = [other for other in self.scores if (other[0] is source) != (other[1] is target)]
        score = self.scores[pair]
        return Match(
            source,
            target,
            self.candidates[pair],
            score,
            score - max(self.scores[other] for other in rivals) if rivals else NO_RIVAL,
            name_score(source, target, numbers=False),
        )


def _matrices(groups: Iterable[ModuleGroup]) -> Counter[Shape]:
    """Return the number of matrices of each shape."""
    return Counter(shape for group in groups for shape in group.shapes.get(WEIGHT, {}).values() if len(shape) == 2)


def match(source: Mapping[str, TensorSpec], target: Mapping[str, TensorSpec]) -> list[Match]:
    """All pairs found between two manifests, in the order of the target."""
    found: list[Match] = []
    for grouping in GROUPINGS:
        links = [link for item in found for link in item.links().items()]
        used = {name for _, names in links for name in names}, {name for name, _ in links}
        if used[0] >= set(source) or used[1] >= set(target):
            break
        left, right = _RoundManifest.of(source, used[0], grouping), _RoundManifest.of(target, used[1], grouping)
        search = Search(left, right, _known(links, left.done, right.done))
        found = resolve_layer_order([*found, *search.run()])
    return sorted(found, key=lambda item: item.target.order)


def _known(
    links: Iterable[tuple[str, Sequence[str]]], sources: Sequence[ModuleGroup], targets: Sequence[ModuleGroup]
) -> list[Link]:
    """Return results of earlier rounds, in the groups of this one."""
    owner = {name: group for group in [*sources, *targets] for name in group.tensor_names()}
    votes: dict[tuple[ModuleGroup, ModuleGroup], int] = defaultdict(int)
    total: dict[ModuleGroup, int] = defaultdict(int)
    for name, origins in links:
        for origin in origins:
            votes[owner[origin], owner[name]] += 1
            total[owner[name]] += 1
    return [(source, target, count / total[target]) for (source, target), count in votes.items()]
