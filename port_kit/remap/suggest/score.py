"""How well one unit explains another: names, sizes of the modules around them, neighbours, and order.

Four kinds of evidence, each in [0, 1]:

* *name*: shared words, rare words counting more, words near the leaf counting more;
* *anchor*: the modules around the two have the same number of elements, instance by instance. Renaming, fusing,
  splitting, reshaping and reordering all keep that number, so few anchors are accidents;
* *flood*: the neighbours of one are, in the assignment found so far, assigned to the neighbours of the other;
* *rank*: both hold the same place among their equals (units of one shape) in the modules around them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from port_kit.remap.suggest.units import HOLE, Index, Unit, size_of
from port_kit.remap.suggest.vocabulary import markedness, natural_key, position, weight_of

NAME, ANCHOR, FLOOD, RANK = 1.0, 0.5, 0.7, 0.35
_REACH = 4  # ancestors looked at, innermost first
_ROOT = 0.9  # a module with more than this share of all units says nothing, unless it is a layer

_FILE_ORDER, _SORTED_ORDER = 0.8, 0.4  # trust in the order of names that differ in words
_NEAR = 2  # components from the innermost one that say where in its layer a module stands
_AGREED = 0.2  # agreement from which two modules count as corresponding

Path = tuple[str, ...]


class Side:
    """One manifest's units, with what is computed once about their surroundings."""

    def __init__(self, units: Sequence[Unit], *, ordered: bool) -> None:
        self.units = list(units)
        self.ordered = ordered
        self.below: dict[Path, list[Unit]] = defaultdict(list)
        self._weights: dict[Unit, dict[str, float]] = {}
        for unit in units:
            for depth in range(1, len(unit.parts)):
                self.below[unit.parts[:depth]].append(unit)

    @cached_property
    def frequency(self) -> Counter[str]:
        """In how many units each word occurs."""
        return Counter(word for unit in self.units for word in unit.words)

    def weights(self, unit: Unit) -> dict[str, float]:
        """The words of a unit's name with how much each says."""
        if unit not in self._weights:
            weights: dict[str, float] = {}
            for word, distance in unit.tokens:
                value = weight_of(word) * (0.3 + 0.7 * self.rarity(word)) * max(0.35, 0.8**distance)
                weights[word] = max(value, weights.get(word, 0.0))
            self._weights[unit] = weights
        return self._weights[unit]

    def rarity(self, word: str) -> float:
        """Close to 1 for a word of one unit, 0 for a word of all."""
        count = self.frequency.get(word, 0)
        total = len(self.units)
        return 1.0 if not count or total < 2 else math.log((total + 1) / count) / math.log(total + 1)

    def ancestors(self, unit: Unit) -> list[Path]:
        """The modules around a unit, innermost first, without the root."""
        limit = _ROOT * len(self.units)
        paths = (unit.parts[:depth] for depth in range(len(unit.parts) - 1, 0, -1))
        return [path for path in paths if len(self.below[path]) <= limit or HOLE in path[-1]]

    def trust(self, equals: Sequence[Unit]) -> float:
        """How much the order of some units means: all where only numbers tell them apart, little in a sorted file whose
        names do not say where in a block they stand.
        """
        names = {tuple(word for word, _ in unit.tokens if not word.startswith("#")) for unit in equals}
        if len(names) == 1:
            return 1.0
        spoken = len({_place(unit) for unit in equals}) == len(equals)  # proj_in, layer, proj_out
        return _FILE_ORDER if self.ordered or spoken else _SORTED_ORDER

    def rank_key(self, unit: Unit) -> tuple[object, ...]:
        """Order among equals: the file's, or where that is sorted the order that the words give.

        In a sorted file the unmarked name goes before the marked one (``to_k`` before ``add_k_proj``).
        """
        if self.ordered:
            return (unit.order,)
        return (_place(unit), sum(map(markedness, unit.words)), natural_key(str(unit)))

    @cached_property
    def profiles(self) -> dict[Path, tuple[int, ...]]:
        """Module -> sorted element counts of its instances (modules of one unit left out)."""
        return {path: self._profile(path, units) for path, units in self.below.items() if len(units) > 1}

    @cached_property
    def profile_counts(self) -> Counter[tuple[int, ...]]:
        """How many different modules have a profile."""
        distinct = {(profile, tuple(map(id, self.below[path]))) for path, profile in self.profiles.items()}
        return Counter(profile for profile, _ in distinct)

    @staticmethod
    def _profile(path: Path, units: Iterable[Unit]) -> tuple[int, ...]:
        holes = sum(HOLE in part for part in path)
        totals: dict[Index, int] = defaultdict(int)
        for unit in units:
            for index, size in size_of(unit).items():
                totals[index[:holes]] += size
        return tuple(sorted(totals.values()))


def _place(unit: Unit) -> int:
    """Where the words of a unit put it among its siblings."""
    return position(word for word, distance in unit.tokens if distance <= _NEAR)


def name_score(source: Unit, target: Unit, left: Side, right: Side, *, numbers: bool = True) -> float:
    """Dice similarity of the two names' words, weighted by rarity, meaning and nearness to the leaf."""
    mine, other = left.weights(source), right.weights(target)
    if not numbers:
        mine, other = ({word: mine[word] for word in mine if word[0] != "#"} for mine in (mine, other))
    total = sum(mine.values()) + sum(other.values())
    shared = sum(min(weight, other[word]) for word, weight in mine.items() if word in other)
    return 2 * shared / total if total else 0.0


def anchor_score(source: Unit, target: Unit, left: Side, right: Side) -> float:
    """Whether the modules around the two have the same size; rare sizes and inner modules count more."""
    profiles = {right.profiles[path] for path in right.ancestors(target) if path in right.profiles}
    best = 0.0
    for path in left.ancestors(source):
        profile = left.profiles.get(path)
        if profile in profiles:
            rivals = left.profile_counts[profile] * right.profile_counts[profile]
            best = max(best, 1 / math.sqrt(rivals))
    return best


class Flood:
    """What an assignment says about pairs of modules."""

    def __init__(
        self,
        assigned: Mapping[Unit, Unit],
        known: Iterable[tuple[Unit, Unit, float]],
        left: Side,
        right: Side,
    ) -> None:
        self.left, self.right = left, right
        self.assigned = {leaf: source for target, source in assigned.items() for leaf in target.leaves}
        self.mass: dict[tuple[Path, Path], float] = defaultdict(float)
        for target, source in assigned.items():
            for s_leaf in source.leaves:
                for t_leaf in target.leaves:
                    share = 1 / max(len(source.leaves), len(target.leaves))
                    for pair in self._pairs(s_leaf, t_leaf):
                        self.mass[pair] += share
        for source, target, share in known:
            for pair in self._pairs(source, target):
                self.mass[pair] += share
        self._order: dict[tuple[int, Path], dict[tuple[object, ...], list[Unit]]] = {}

    def _pairs(self, source: Unit, target: Unit) -> list[tuple[Path, Path]]:
        mine = self.left.ancestors(source)[:_REACH]
        other = self.right.ancestors(target)[:_REACH]
        return [(a, b) for a in mine for b in other]

    def agreement(self, a: Path, b: Path, own: float) -> float:
        """Share of the units of two modules that are assigned to each other, one pair's own vote left out."""
        size = math.sqrt((len(self.left.below[a]) - own) * (len(self.right.below[b]) - own))
        return (self.mass[a, b] - own) / size if size > 0 and (a, b) in self.mass else 0.0

    def score(self, source: Unit, target: Unit) -> float:
        """Agreement of the modules around a pair, inner modules counting more."""
        own = 1.0 if self.assigned.get(target.leaves[0]) is source else 0.0
        paths = self.right.ancestors(target.leaves[0])[:_REACH]
        total = best = 0.0
        for depth, path in enumerate(self.left.ancestors(source.leaves[0])[:_REACH]):
            weight = 0.7**depth
            total += weight
            best += weight * max((self.agreement(path, other, own) for other in paths), default=0.0)
        return min(1.0, best / total) if total else 0.0

    def rank(self, source: Unit, target: Unit) -> float:
        """1 where both are the n-th of as many equals in modules that correspond, 0 where they are not, 0.5 unknown."""
        if source.members or target.members:
            return 0.5
        total = weights = 0.0
        for a, b in self._pairs(source, target):
            weight = self.agreement(a, b, 0.0)
            if weight < _AGREED:
                continue
            mine = self._equals(self.left, a, source)
            other = self._equals(self.right, b, target)
            if len(mine) != len(other) or len(mine) < 2:
                continue
            trust = min(self.left.trust(mine), self.right.trust(other))
            weights += weight
            total += weight * (trust if mine.index(source) == other.index(target) else -trust)
        return 0.5 + total / weights / 2 if weights else 0.5

    def _equals(self, side: Side, path: Path, unit: Unit) -> list[Unit]:
        key = (id(side), path)
        if key not in self._order:
            classes: dict[tuple[object, ...], list[Unit]] = defaultdict(list)
            for other in sorted(side.below[path], key=side.rank_key):
                classes[equality_class(other)].append(other)
            self._order[key] = classes
        return self._order[key][equality_class(unit)]


def equality_class(unit: Unit) -> tuple[object, ...]:
    """Units of one class differ in name only: same count of instances, roles and sizes of the first instance."""
    first = unit.instances[0]
    return (
        len(unit.instances),
        tuple((role, tuple(size for size in unit.shapes[role][first] if size != 1)) for role in unit.roles),
    )
