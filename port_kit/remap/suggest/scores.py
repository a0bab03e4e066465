"""Scores of one group as the origin of another.

Four kinds of evidence, each in [0, 1]:

* *name*: shared words; words near the leaf count more;
* *size*: the modules around the two have the same number of elements, instance by instance. Renaming, fusing,
  splitting, reshaping and reordering all keep that number;
* *neighbors*: the neighbors of one are, in the assignment found so far, assigned to the neighbors of the other;
* *order*: both hold the same place among their peers (groups of one shape) in the modules around them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import product

from port_kit.remap.suggest.alignment import shape_class
from port_kit.remap.suggest.module_groups import INDEX_SLOT, Index, ModuleGroup, size_of
from port_kit.remap.suggest.vocabulary import natural_key, position, secondary_rank, weight_of

NAME_WEIGHT, SIZE_WEIGHT, NEIGHBOR_WEIGHT, ORDER_WEIGHT = 1.0, 0.5, 0.7, 0.35
#: Evidence of equal names within a layer: more than an order of peers weighs.
SAME_PATH_WEIGHT = 0.4
_MAX_ANCESTORS = 4
_FILE_ORDER, _SORTED_ORDER = 0.8, 0.4  # reliability of an order of names that differ in words
_NEAR = 2  # components from the innermost one that tell the position of a module in its layer
_AGREED = 0.2  # agreement from which two modules count as corresponding

Path = tuple[str, ...]
#: (source, target, share of the target that the source explains)
Link = tuple[ModuleGroup, ModuleGroup, float]


def ancestors(group: ModuleGroup) -> list[Path]:
    """Return the modules around a group, innermost first, without the root."""
    return [group.parts[:depth] for depth in range(len(group.parts) - 1, 0, -1)][:_MAX_ANCESTORS]


class ManifestView:
    """One manifest's groups, with facts about their surroundings, computed once."""

    def __init__(self, groups: Sequence[ModuleGroup], *, ordered: bool) -> None:
        self.groups = list(groups)
        self.ordered = ordered
        self.descendants: dict[Path, list[ModuleGroup]] = defaultdict(list)
        for group in groups:
            for depth in range(1, len(group.parts)):
                self.descendants[group.parts[:depth]].append(group)

    def order_weight(self, peers: Sequence[ModuleGroup]) -> float:
        """Reliability of the order of some groups: full if only numbers tell them apart, low in a sorted file if their
        names do not tell their positions in a block.
        """
        names = {tuple(word for word, _ in group.tokens if not word.startswith("#")) for group in peers}
        if len(names) == 1:
            return 1.0
        named = len({_position(group) for group in peers}) == len(peers)  # proj_in, layer, proj_out
        return _FILE_ORDER if self.ordered or named else _SORTED_ORDER

    def order_key(self, group: ModuleGroup) -> tuple[object, ...]:
        """Sort key among peers: the order of the file, or if that is sorted the order that the words give.

        In a sorted file the primary stream goes before the secondary one (``to_k`` before ``add_k_proj``).
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
        """Return the number of different modules that have a profile."""
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
    """Position among its siblings that the words of a group give it."""
    return position(word for word, distance in group.tokens if distance <= _NEAR)


@lru_cache(maxsize=1 << 14)
def _word_weights(tokens: tuple[tuple[str, int], ...], *, numbers: bool) -> dict[str, float]:
    weights: dict[str, float] = {}
    for word, distance in tokens:
        if numbers or not word.startswith("#"):
            weights[word] = max(weight_of(word) * max(0.35, 0.8**distance), weights.get(word, 0.0))
    return weights


def name_score(source: ModuleGroup, target: ModuleGroup, *, numbers: bool = True) -> float:
    """Dice similarity of the two names' words, weighted by meaning and nearness to the leaf."""
    left, right = (_word_weights(group.tokens, numbers=numbers) for group in (source, target))
    total = sum(left.values()) + sum(right.values())
    shared = sum(min(weight, right[word]) for word, weight in left.items() if word in right)
    return 2 * shared / total if total else 0.0


def has_same_path(source: ModuleGroup, target: ModuleGroup) -> bool:
    """Return True if two modules have equal names down from the layer, or from the root, of two components or more.

    Names that end in a number are positions, which other code may count from another module.
    """
    path = _inner_path(source.parts)
    return len(path) > 1 and not path[-1].isdigit() and path == _inner_path(target.parts)


@lru_cache(maxsize=1 << 14)
def _inner_path(parts: Path) -> Path:
    last = max((depth for depth, part in enumerate(parts) if INDEX_SLOT in part), default=-1)
    return parts[last + 1 :]


def size_score(source: ModuleGroup, target: ModuleGroup, left: ManifestView, right: ManifestView) -> float:
    """Return 0 if no modules around the two have the same size, more the rarer that size is."""
    profiles = {right.profiles[path] for path in ancestors(target) if path in right.profiles}
    shared = [left.profiles[path] for path in ancestors(source) if left.profiles.get(path) in profiles]
    rivals = [left.profile_counts[profile] * right.profile_counts[profile] for profile in shared]
    return 1 / math.sqrt(min(rivals)) if rivals else 0.0


class NeighborScores:
    """Evidence of an assignment about pairs of modules."""

    def __init__(self, links: Iterable[Link], left: ManifestView, right: ManifestView) -> None:
        self.left, self.right = left, right
        self.assigned: dict[ModuleGroup, ModuleGroup] = {}
        self.votes: dict[tuple[Path, Path], float] = defaultdict(float)
        for source, target, share in links:
            self.assigned |= {leaf: source for leaf in target.leaves}
            for s_leaf, t_leaf in product(source.leaves, target.leaves):
                for pair in product(ancestors(s_leaf), ancestors(t_leaf)):
                    self.votes[pair] += share
        self._order: dict[tuple[int, Path], dict[tuple[object, ...], list[ModuleGroup]]] = {}

    def agreement(self, a: Path, b: Path, own_vote: float) -> float:
        """Share of the groups of two modules that are assigned to each other, one pair's own vote left out."""
        size = math.sqrt((len(self.left.descendants[a]) - own_vote) * (len(self.right.descendants[b]) - own_vote))
        return (self.votes[a, b] - own_vote) / size if size > 0 and (a, b) in self.votes else 0.0

    def score(self, source: ModuleGroup, target: ModuleGroup) -> float:
        """Agreement of the modules around a pair, inner modules counting more."""
        own_vote = 1.0 if self.assigned.get(target.leaves[0]) is source else 0.0
        paths = ancestors(target.leaves[0])
        total = best = 0.0
        for depth, path in enumerate(ancestors(source.leaves[0])):
            weight = 0.7**depth
            total += weight
            best += weight * max((self.agreement(path, other, own_vote) for other in paths), default=0.0)
        return min(1.0, best / total) if total else 0.0

    def order_score(self, source: ModuleGroup, target: ModuleGroup) -> float:
        """1 if both are the n-th of as many peers in modules that correspond, 0 if they are not, 0.5 unknown."""
        if source.members or target.members:
            return 0.5
        total = weights = 0.0
        for a, b in product(ancestors(source), ancestors(target)):
            weight = self.agreement(a, b, 0.0)
            if weight < _AGREED:
                continue
            peers = self._peers(self.left, a, source)
            other_peers = self._peers(self.right, b, target)
            if len(peers) != len(other_peers) or len(peers) < 2:
                continue
            order_weight = min(self.left.order_weight(peers), self.right.order_weight(other_peers))
            weights += weight
            total += weight * (order_weight if peers.index(source) == other_peers.index(target) else -order_weight)
        return 0.5 + total / weights / 2 if weights else 0.5

    def _peers(self, view: ManifestView, path: Path, group: ModuleGroup) -> list[ModuleGroup]:
        key = (id(view), path)
        if key not in self._order:
            classes: dict[tuple[object, ...], list[ModuleGroup]] = defaultdict(list)
            for other in sorted(view.descendants[path], key=view.order_key):
                classes[shape_class(other)].append(other)
            self._order[key] = classes
        return self._order[key][shape_class(group)]
