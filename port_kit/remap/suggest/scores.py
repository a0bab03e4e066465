"""How well one group explains another: names, sizes of the modules around them, neighbours, and order.

Four kinds of evidence, each in [0, 1]:

* *name*: shared words, rare words counting more, words near the leaf counting more;
* *anchor*: the modules around the two have the same number of elements, instance by instance. Renaming, fusing,
  splitting, reshaping and reordering all keep that number, so few sizes are accidents;
* *neighbors*: the neighbours of one are, in the assignment found so far, assigned to the neighbours of the other;
* *rank*: both hold the same place among their peers (groups of one shape) in the modules around them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from port_kit.remap.suggest.alignment import shape_class
from port_kit.remap.suggest.module_groups import INDEX_SLOT, Index, ModuleGroup, size_of
from port_kit.remap.suggest.vocabulary import natural_key, position, secondary_rank, weight_of

NAME_WEIGHT, SIZE_WEIGHT, NEIGHBOR_WEIGHT, ORDER_WEIGHT = 1.0, 0.5, 0.7, 0.35
_MAX_ANCESTORS = 4  # ancestors looked at, innermost first

_FILE_ORDER, _SORTED_ORDER = 0.8, 0.4  # order_weight in the order of names that differ in words
_NEAR = 2  # components from the innermost one that say where in its layer a module stands
_AGREED = 0.2  # agreement from which two modules count as corresponding

Path = tuple[str, ...]


class ManifestView:
    """One manifest's groups, with what is computed once about their surroundings."""

    def __init__(self, groups: Sequence[ModuleGroup], *, ordered: bool) -> None:
        self.groups = list(groups)
        self.ordered = ordered
        self.descendants: dict[Path, list[ModuleGroup]] = defaultdict(list)
        self._weights: dict[ModuleGroup, dict[str, float]] = {}
        for group in groups:
            for depth in range(1, len(group.parts)):
                self.descendants[group.parts[:depth]].append(group)

    def weights(self, group: ModuleGroup) -> dict[str, float]:
        """The words of a group's name with how much each says."""
        if group not in self._weights:
            weights: dict[str, float] = {}
            for word, distance in group.tokens:
                value = weight_of(word) * max(0.35, 0.8**distance)
                weights[word] = max(value, weights.get(word, 0.0))
            self._weights[group] = weights
        return self._weights[group]

    def ancestors(self, group: ModuleGroup) -> list[Path]:
        """The modules around a group, innermost first, without the root."""
        return [group.parts[:depth] for depth in range(len(group.parts) - 1, 0, -1)]

    def order_weight(self, peers: Sequence[ModuleGroup]) -> float:
        """How much the order of some groups means: all where only numbers tell them apart, little in a sorted file whose
        names do not say where in a block they stand.
        """
        names = {tuple(word for word, _ in group.tokens if not word.startswith("#")) for group in peers}
        if len(names) == 1:
            return 1.0
        named = len({_position(group) for group in peers}) == len(peers)  # proj_in, layer, proj_out
        return _FILE_ORDER if self.ordered or named else _SORTED_ORDER

    def order_key(self, group: ModuleGroup) -> tuple[object, ...]:
        """Order among peers: the file's, or where that is sorted the order that the words give.

        In a sorted file the unmarked name goes before the marked one (``to_k`` before ``add_k_proj``).
        """
        if self.ordered:
            return (group.order,)
        return (_position(group), sum(map(secondary_rank, group.words)), natural_key(str(group)))

    @cached_property
    def profiles(self) -> dict[Path, tuple[int, ...]]:
        """Module -> sorted element counts of its instances (modules of one group left out)."""
        return {path: self._profile(path, groups) for path, groups in self.descendants.items() if len(groups) > 1}

    @cached_property
    def profile_counts(self) -> Counter[tuple[int, ...]]:
        """How many different modules have a profile."""
        distinct = {(profile, tuple(map(id, self.descendants[path]))) for path, profile in self.profiles.items()}
        return Counter(profile for profile, _ in distinct)

    @staticmethod
    def _profile(path: Path, groups: Iterable[ModuleGroup]) -> tuple[int, ...]:
        slots = sum(INDEX_SLOT in part for part in path)
        totals: dict[Index, int] = defaultdict(int)
        for group in groups:
            for index, size in size_of(group).items():
                totals[index[:slots]] += size
        return tuple(sorted(totals.values()))


def _position(group: ModuleGroup) -> int:
    """Where the words of a group put it among its siblings."""
    return position(word for word, distance in group.tokens if distance <= _NEAR)


def name_score(
    source: ModuleGroup, target: ModuleGroup, left: ManifestView, right: ManifestView, *, numbers: bool = True
) -> float:
    """Dice similarity of the two names' words, weighted by rarity, meaning and nearness to the leaf."""
    mine, other = left.weights(source), right.weights(target)
    if not numbers:
        mine, other = ({word: mine[word] for word in mine if word[0] != "#"} for mine in (mine, other))
    total = sum(mine.values()) + sum(other.values())
    shared = sum(min(weight, other[word]) for word, weight in mine.items() if word in other)
    return 2 * shared / total if total else 0.0


def size_score(source: ModuleGroup, target: ModuleGroup, left: ManifestView, right: ManifestView) -> float:
    """Whether the modules around the two have the same size; rare sizes and inner modules count more."""
    profiles = {right.profiles[path] for path in right.ancestors(target) if path in right.profiles}
    best = 0.0
    for path in left.ancestors(source):
        profile = left.profiles.get(path)
        if profile in profiles:
            rivals = left.profile_counts[profile] * right.profile_counts[profile]
            best = max(best, 1 / math.sqrt(rivals))
    return best


class NeighborScores:
    """What an assignment says about pairs of modules."""

    def __init__(
        self,
        assigned: Mapping[ModuleGroup, ModuleGroup],
        known: Iterable[tuple[ModuleGroup, ModuleGroup, float]],
        left: ManifestView,
        right: ManifestView,
    ) -> None:
        self.left, self.right = left, right
        self.assigned = {leaf: source for target, source in assigned.items() for leaf in target.leaves}
        self.votes: dict[tuple[Path, Path], float] = defaultdict(float)
        for target, source in assigned.items():
            for s_leaf in source.leaves:
                for t_leaf in target.leaves:
                    share = 1 / max(len(source.leaves), len(target.leaves))
                    for pair in self._pairs(s_leaf, t_leaf):
                        self.votes[pair] += share
        for source, target, share in known:
            for pair in self._pairs(source, target):
                self.votes[pair] += share
        self._order: dict[tuple[int, Path], dict[tuple[object, ...], list[ModuleGroup]]] = {}

    def _pairs(self, source: ModuleGroup, target: ModuleGroup) -> list[tuple[Path, Path]]:
        mine = self.left.ancestors(source)[:_MAX_ANCESTORS]
        other = self.right.ancestors(target)[:_MAX_ANCESTORS]
        return [(a, b) for a in mine for b in other]

    def agreement(self, a: Path, b: Path, own_vote: float) -> float:
        """Share of the groups of two modules that are assigned to each other, one pair's own vote left out."""
        size = math.sqrt((len(self.left.descendants[a]) - own_vote) * (len(self.right.descendants[b]) - own_vote))
        return (self.votes[a, b] - own_vote) / size if size > 0 and (a, b) in self.votes else 0.0

    def score(self, source: ModuleGroup, target: ModuleGroup) -> float:
        """Agreement of the modules around a pair, inner modules counting more."""
        own_vote = 1.0 if self.assigned.get(target.leaves[0]) is source else 0.0
        paths = self.right.ancestors(target.leaves[0])[:_MAX_ANCESTORS]
        total = best = 0.0
        for depth, path in enumerate(self.left.ancestors(source.leaves[0])[:_MAX_ANCESTORS]):
            weight = 0.7**depth
            total += weight
            best += weight * max((self.agreement(path, other, own_vote) for other in paths), default=0.0)
        return min(1.0, best / total) if total else 0.0

    def order_score(self, source: ModuleGroup, target: ModuleGroup) -> float:
        """1 where both are the n-th of as many peers in modules that correspond, 0 where they are not, 0.5 unknown."""
        if source.members or target.members:
            return 0.5
        total = weights = 0.0
        for a, b in self._pairs(source, target):
            weight = self.agreement(a, b, 0.0)
            if weight < _AGREED:
                continue
            mine = self._peers(self.left, a, source)
            other = self._peers(self.right, b, target)
            if len(mine) != len(other) or len(mine) < 2:
                continue
            order_weight = min(self.left.order_weight(mine), self.right.order_weight(other))
            weights += weight
            total += weight * (order_weight if mine.index(source) == other.index(target) else -order_weight)
        return 0.5 + total / weights / 2 if weights else 0.5

    def _peers(self, side: ManifestView, path: Path, group: ModuleGroup) -> list[ModuleGroup]:
        key = (id(side), path)
        if key not in self._order:
            classes: dict[tuple[object, ...], list[ModuleGroup]] = defaultdict(list)
            for other in sorted(side.descendants[path], key=side.order_key):
                classes[shape_class(other)].append(other)
            self._order[key] = classes
        return self._order[key][shape_class(group)]
