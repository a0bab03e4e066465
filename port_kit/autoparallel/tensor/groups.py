"""Groups of linears that are split together, and the segments of their channels.

A component is a set of channels that must be on one rank. Components of one group are alike: they touch the same
sides, in the same order. Rank ``r`` of ``n`` holds the r-th n-th part of the components of a group. The channels of a
side are then a sequence of segments, each of which is split evenly in rank order: one segment for heads, two for the
halves of a gated unit, three or more for a fused projection.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from port_kit.autoparallel.tensor.trace import Axis, Connections, Node, Side


@dataclass(frozen=True)
class Segment:
    """Consecutive entries of an axis that are split evenly.

    Attributes:
        group: the group that splits it.
        size: entries of the segment.
        unit: entries that must stay together, such as the channels of a head.
    """

    group: int
    size: int
    unit: int


@dataclass
class Groups:
    """The split of one block.

    Attributes:
        counts: number of components per group.
        sides: segments of each side that is split.
        axes: segments of each axis of an input or parameter that is split.
        refused: reasons why components that look independent are not split.
    """

    counts: list[int] = field(default_factory=list)
    sides: dict[Side, tuple[Segment, ...]] = field(default_factory=dict)
    axes: dict[Axis, tuple[Segment, ...]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def of(self, kind: str) -> dict[str, tuple[Segment, ...]]:
        """Return the segments of all sides of a kind, by module."""
        return {side.module: segments for side, segments in self.sides.items() if side.kind == kind}


def find_groups(found: Connections, weights: dict[str, int]) -> Groups:
    """Divide components into groups, and keep those that can be split.

    Args:
        found: connections of the block.
        weights: elements of each linear, which decide if its input and its output could both be split.
    """
    search = _Search(found, weights)
    while search.narrow():
        pass
    return search.result()


class _Search:
    """Components of a block; those that cannot be split are moved to ``whole`` until nothing changes."""

    def __init__(self, found: Connections, weights: dict[str, int]) -> None:
        self.found, self.weights = found, weights
        self.refused: list[str] = []
        self.labels = {
            side: [found.root(Node(side, channel)) for channel in range(size)] for side, size in found.sizes.items()
        }
        touched: dict[Node, Counter[Side]] = defaultdict(Counter)
        for side, roots in self.labels.items():
            for root in roots:
                touched[root][side] += 1
        self.touched = {root: frozenset(sides.items()) for root, sides in touched.items()}
        self.whole = {found.root(node) for node in found.exits}
        for root, touches in self.touched.items():
            sides = [side for side, _ in touches]
            if not {"in", "out"} <= {side.kind for side in sides} or not self._is_computed(sides):
                self.whole.add(root)
        self.reads: dict[Node, dict[Axis, int]] = defaultdict(lambda: defaultdict(int))
        for node, axes in found.reads.items():
            for axis, entries in axes.items():
                self.reads[found.root(node)][axis] |= entries

    def _is_computed(self, sides: Sequence[Side]) -> bool:
        """Return True if outputs have as many positions as the inputs they lead to.

        Otherwise the inputs depend on something else as well, such as a normalized token that a modulation scales.
        """
        inputs = max(self.found.positions[side] for side in sides if side.kind == "in")
        return max(self.found.positions[side] for side in sides if side.kind == "out") >= inputs

    def narrow(self) -> bool:
        """Move components to ``whole``; return True if there were any."""
        before = len(self.whole)
        self._order()
        for group in self.groups:
            if len(group) < 2:
                self.whole.update(group)
        for roots in self.labels.values():
            if any(root not in self.whole for root in roots) and self._segments(roots) is None:
                self.whole.update(roots)
        self._one_side_of_a_linear()
        self._read_axes()
        return len(self.whole) > before

    def _order(self) -> None:
        """Group components with equal numbers of channels on the same sides, in order of their first channels."""
        ordered: dict[frozenset[tuple[Side, int]], list[Node]] = defaultdict(list)
        for roots in self.labels.values():
            for root in dict.fromkeys(roots):
                members = ordered[self.touched[root]]
                if root not in self.whole and root not in members:
                    members.append(root)
        self.groups = [members for members in ordered.values() if members]
        self.position = {root: (g, i) for g, members in enumerate(self.groups) for i, root in enumerate(members)}

    def _segments(self, roots: Sequence[Node]) -> tuple[Segment, ...] | None:
        """Return the segments of a side, or None if it does not consist of segments."""
        if any(root not in self.position for root in roots):
            return None
        return parse_segments([self.position[root] for root in roots], [len(members) for members in self.groups])

    def _one_side_of_a_linear(self) -> None:
        """Leave the input or the output of a linear whole if both could be split: the one with fewer elements."""
        for side in self.labels:
            other = Side("in", side.module)
            if side.kind != "out" or other not in self.labels:
                continue
            outs, ins = ({root for root in self.labels[s]} - self.whole for s in (side, other))
            if outs and ins:
                self.whole |= ins if self._size(outs) >= self._size(ins) else outs

    def _size(self, roots: Iterable[Node]) -> int:
        modules = {side.module for root in roots for side, _ in self.touched[root] if side.kind != "norm"}
        return sum(self.weights.get(module, 0) for module in modules)

    def _read_axes(self) -> None:
        """Move components to ``whole`` that read a part of an axis that cannot be split."""
        for axis in {axis for axes in self.reads.values() for axis in axes}:
            readers = {root: axes[axis] for root, axes in self.reads.items() if axis in axes}
            if self._axis(axis, readers) is None:
                self.whole |= {root for root in readers if root in self.position and root not in self.whole}

    def _axis(self, axis: Axis, readers: dict[Node, int]) -> tuple[Segment, ...] | None:
        """Return the segments of an axis, none if all of it is read, or None if readers are in conflict."""
        split = {root: bits for root, bits in readers.items() if root not in self.whole}
        if not split or len(set(split.values())) == 1 and (len(split) > 1 or len(readers) == 1):
            return ()
        everything = 0
        for bits in split.values():
            if everything & bits:
                return None
            everything |= bits
        shared = any(bits & everything for root, bits in readers.items() if root in self.whole)
        if shared or everything != (1 << self.found.extents[axis]) - 1:
            return None
        owner = {entry: root for root, bits in split.items() for entry in _entries(bits)}
        return self._segments([owner[entry] for entry in range(len(owner))])

    def result(self) -> Groups:
        """Return what is split."""
        groups = Groups([len(members) for members in self.groups], refused=self.refused)
        for side, roots in self.labels.items():
            segments = self._segments(roots) if any(root not in self.whole for root in roots) else None
            if segments:
                groups.sides[side] = segments
        for axis in {axis for axes in self.reads.values() for axis in axes}:
            readers = {root: axes[axis] for root, axes in self.reads.items() if axis in axes}
            segments = self._axis(axis, readers)
            if segments:
                groups.axes[axis] = segments
        return groups


def _entries(bits: int) -> list[int]:
    return [entry for entry in range(bits.bit_length()) if bits >> entry & 1]


def parse_segments(labels: Sequence[tuple[int, int]], counts: Sequence[int]) -> tuple[Segment, ...] | None:
    """Parse ``(group, component)`` per entry to segments; None if they are not complete, ascending and even."""
    runs = [(label, len(list(items))) for label, items in groupby(labels)]
    segments: list[Segment] = []
    at = 0
    while at < len(runs):
        (group, first), unit = runs[at]
        stop = at + counts[group]
        expected = [((group, index), unit) for index in range(counts[group])]
        if first or runs[at:stop] != expected:
            return None
        segments.append(Segment(group, unit * counts[group], unit))
        at = stop
    return tuple(segments)
