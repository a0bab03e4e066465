"""How sure a match is, and why not surer.

``certain`` is said only where the names leave one reading and nothing that shapes cannot show could have happened:
rows that a code base interleaves, rotates or swaps look the same from outside. Everything else that has evidence is
``likely``; what has none is left out and reported.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from port_kit.remap.suggest.alignment import alignments, signature
from port_kit.remap.suggest.match import Match
from port_kit.remap.suggest.module_groups import INDEX_SLOT, ModuleGroup
from port_kit.remap.suggest.vocabulary import words

CERTAIN, LIKELY, GUESS = "certain", "likely", "guess"

_NAME = 0.3  # names share this much of their words
_NAME_MARGIN = 0.08  # and this much more than any rival's
_MARGIN = 0.2  # all evidence together exceeds any rival's by this much
_SAME_CONVENTION = 0.7  # share of a block's names that both sides have, from which they are the same code
_SAME_CODE = 0.9  # and share of all names, from which rows are taken to lie alike too
_MODULATION = {"modulation", "shift", "table"}
_SINGLES = 3  # the round that looks at single tensors
_GUESS = 0.3  # below: no evidence at all


@dataclass(frozen=True)
class Verdict:
    """``level`` is certain, likely or guess; ``doubts`` say what keeps it from being certain."""

    level: str
    doubts: tuple[str, ...] = ()


class Judge:
    """Verdicts on the matches of one search; some look at the other matches around."""

    def __init__(self, found: Sequence[Match]) -> None:
        self._kept: dict[tuple[str, ...], list[bool]] = defaultdict(list)
        self._columns: dict[tuple[str, ...], set[int]] = defaultdict(set)
        self._weak = Counter(signature(item.target) for item in found if _weak(item))
        plain = [item for item in found if not item.source.members and not item.target.members]
        same = sum(map(_same_name, plain))
        #: both sides are the same code but for what it fuses
        self._same_code = same >= _SAME_CODE * len(plain)
        #: nothing at all is done but to change what stands before the names
        self._identity = same == len(found)
        self._turns = any(item.change == "transpose" or item.alignment.relation == "transpose" for item in found)
        #: modules whose w1 and w2 have one shape: gate and up, in an order of their own_vote
        self._other_gates = _other_gates(
            [group for item in found for group in (*item.source.leaves, *item.target.leaves)]
        )
        #: modules under which positions are learned, on both sides
        self._learned = tuple(
            {group.parts[: _component_depth(group)] for group in side if _is_position_table(group)}
            for side in ([item.source for item in found], [item.target for item in found])
        )
        for item in found:
            self._kept[_block(item.target)].append(_same_name(item))
            self._columns[item.target.parts[:-2]] |= set(_sizes(item.target, 1))

    def verdict(self, item: Match) -> Verdict:
        """Judge one match."""
        if _weak(item) and self._weak[signature(item.target)] > 1:
            return Verdict(GUESS, ("neither names nor surroundings speak for it",))
        doubts = [
            *_doubts_of_kind(item),
            *_doubts_of_order(item),
            *self._hidden_changes(item),
            *self._doubts_of_names(item),
        ]
        return Verdict(LIKELY if doubts else CERTAIN, tuple(doubts))

    def _hidden_changes(self, item: Match) -> Iterator[str]:
        """What a conversion may have done to rows without changing a shape; equal names prove little."""
        if self._identity:
            return
        if (
            _square(item)
            and not item.change
            and (self._turns or _tensor_names(item.source) != _tensor_names(item.target))
        ):
            yield "other weights are transposed or called otherwise; a square shape cannot show which way this one lies"
        same_leaf = _leaf_name(item.source) == _leaf_name(item.target)
        alike = same_leaf and self._same_code
        leaf = set(item.source.leaf_words) | set(item.target.leaf_words)
        near = leaf | {word for group in (item.source, item.target) for word, far in group.tokens if far < 2}
        if {"q", "k", "v"} <= near:
            yield "rows of a fused projection may be interleaved by head"
        elif near & {"q", "k"} and not alike and not self._has_positions(item):
            yield "rows of query and key may be permuted for another rotary convention"
        if not alike and (near & _MODULATION or _norm_projection(item.target) or _norm_projection(item.source)):
            yield "chunks of a modulation (shift, scale, gate) may have another order"
        if not same_leaf and any(group.parts[:-1] in self._other_gates for group in (item.source, item.target)):
            yield "w1 and w2 are of one shape: they are not what llama-style code calls so"
        if {"gate", "up"} <= near or not alike and self._gated(item.target):
            yield "halves of a gated projection may have changed places"

    def _has_positions(self, item: Match) -> bool:
        """Whether the component around a module learns its positions on both sides: then nothing is rotated."""
        return all(
            any(group.parts[: len(path)] == path for path in known)
            for group, known in zip((item.source, item.target), self._learned, strict=True)
        )

    def _gated(self, group: ModuleGroup) -> bool:
        """Whether a projection is twice as wide as what its sibling takes."""
        columns = self._columns[group.parts[:-2]] | self._columns[group.parts[:-1]]
        return "ff" in group.words and any(rows % 2 == 0 and rows // 2 in columns for rows in _sizes(group, 0))

    def _doubts_of_names(self, item: Match) -> Iterator[str]:
        kept = self._kept[_block(item.target)]
        if _same_name(item) and sum(kept) >= _SAME_CONVENTION * len(kept):
            return
        if item.name < _NAME:
            yield "the names have little in common"
        if item.name_margin < _NAME_MARGIN:
            yield "only order and surroundings tell it from others of its shape"
        if item.margin < _MARGIN:
            yield "others of its shape fit nearly as well"


def _weak(item: Match) -> bool:
    """Whether next to nothing speaks for a match; a single one of its size is still right by elimination."""
    return item.name == 0.0 and item.score < _GUESS and item.margin < _MARGIN


def _doubts_of_kind(item: Match) -> Iterator[str]:
    if item.change == "swap":
        yield "the halves change places by convention (shift, scale to scale, shift); shapes cannot show it"
    elif item.change:
        yield "transposed as the other linears of the model are; a square shape cannot show it"
    elif item.alignment.relation in ("transpose", "flatten"):
        yield f"the shapes fit by {item.alignment.relation} only"
    kinds = {group.kind for group in (item.source, item.target, *item.source.members, *item.target.members)}
    if "concat" in kinds:
        yield "the parts are taken to lie one after another, not interleaved, in this order"


def _doubts_of_order(item: Match) -> Iterator[str]:
    if item.round == _SINGLES and not _same_name(item):
        yield "found tensor by tensor among what the lists of layers left over"
    if len(item.alignment.pairs) > 1 and item.alignment.order == "same" and _may_count_down(item):
        yield "levels of an upward path count backwards in other code; shapes allow both"
    if len(item.alignment.pairs) < 2 or item.alignment.order == "same":
        return
    if item.alignment.order == "subset":
        yield "the source has more layers than the target"
    elif item.alignment.order == "sequence":
        yield "layers are matched by their order, not by their number"
    elif len(list(alignments(item.source, item.target))) > 1:
        yield "the layers count backwards as their neighbours do; shapes allow both"


def _may_count_down(item: Match) -> bool:
    """Whether the outer list is a decoder's upward path that the two sides call by different names."""
    lists = [_list_name(group) for group in (item.source, item.target)]
    upward = any("up" in words(name) or "upsample" in words(name) for name in lists)
    orders = {choice.order for choice in alignments(item.source, item.target)} if upward else set()
    return lists[0] != lists[1] and "reversed" in orders


def _list_name(group: ModuleGroup) -> str:
    """What the outermost list of a group is called."""
    depth = next((depth for depth, part in enumerate(group.parts) if INDEX_SLOT in part), 0)
    return (
        group.parts[depth - 1]
        if group.parts[depth] == INDEX_SLOT and depth
        else group.parts[depth].replace(INDEX_SLOT, "")
    )


def _block(group: ModuleGroup) -> tuple[str, ...]:
    """The innermost repeated container of a group, or the model."""
    depths = [depth for depth, part in enumerate(group.parts[:-1]) if "{}" in part]
    return group.parts[: depths[0] + 1] if depths else ()


def _same_name(item: Match) -> bool:
    """Whether one name is the end of the other."""
    one, two = sorted((item.source.parts, item.target.parts), key=len)
    return bool(one) and two[-len(one) :] == one


def _leaf_name(group: ModuleGroup) -> tuple[str, ...]:
    """The innermost component that is not a bare number, and what follows it."""
    for depth in range(len(group.parts) - 1, -1, -1):
        if not group.parts[depth].isdigit() and group.parts[depth] != "{}":
            return group.parts[depth:]
    return group.parts


def _norm_projection(group: ModuleGroup) -> bool:
    return len(group.parts) > 1 and group.parts[-1].startswith("linear") and "norm" in group.parts[-2]


def _other_gates(groups: Iterable[ModuleGroup]) -> set[tuple[str, ...]]:
    shapes = {group.parts: next(iter(group.shapes["weight"].values())) for group in groups if "weight" in group.shapes}
    return {
        parts[:-1]
        for parts, shape in shapes.items()
        if parts[-1] == "w1" and shapes.get((*parts[:-1], "w2")) == shape and len(set(shape)) > 1
    }


def _is_position_table(group: ModuleGroup) -> bool:
    """Whether a tensor is a table of learned positions, by its own name."""
    return {"position", "embed"} <= set(group.leaf_words) and not group.members and group.roles == ("weight",)


def _component_depth(group: ModuleGroup) -> int:
    """How much of the name of a position table is the component that it serves."""
    return max(0, len(group.parts) - (2 if "embed" in words(group.parts[-2]) else 1)) if len(group.parts) > 1 else 0


def _square(item: Match) -> bool:
    """Whether a matrix of the match (or of a stack of them) could be its own transpose by its shape."""
    shapes = item.target.shapes.get("weight", {}).values()
    return any(len(shape) in (2, 3) and shape[-2] == shape[-1] > 1 for shape in shapes)


def _tensor_names(group: ModuleGroup) -> frozenset[str]:
    """What the matrices of a group are called in their modules (``weight``, ``kernel``)."""
    leaves = {leaf for part in group.leaves for leaf in map(_last, part.names.get("weight", {}).values())}
    return frozenset(leaves)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _sizes(group: ModuleGroup, axis: int) -> list[int]:
    shapes = group.shapes.get("weight", {}).values()
    return [shape[axis] for shape in shapes if len(shape) == 2]
