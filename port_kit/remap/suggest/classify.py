"""Classification of matches as certain, likely or rejected.

A match is *certain* if shapes, counts and dtypes leave one possibility. Names cannot make it certain, equal names
neither; they can only cast doubt on it. All of this must hold for every tensor of the match:

* Pairing: it stands outside of lists of layers, and no other tensor that exists once in its manifest has as many
  elements. Siblings of one size may have exchanged their names, and layers may be counted backwards.
* Order of the elements: it has one element, or it is the vector of a norm along the width of the model, the smallest
  extent that more than half of the tensors share. A matrix may be transposed, and its rows or columns may be permuted
  (heads, rotary pairs, shift and scale, gate and up); other vectors may consist of such parts.
* Values: it is named no scale, and neither manifest holds a quantized dtype.
* Names: they have much in common, and contain no word that code bases are known to order differently.

Everything else that has evidence is *likely* and carries its doubts; without evidence it is *rejected*. Both levels
speak of the place of each value, not of arithmetic: a norm that is stored as its difference from one looks the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from port_kit.manifest import TensorSpec
from port_kit.remap.suggest.alignment import alignments, drop_unit_dims, signature
from port_kit.remap.suggest.match import Match
from port_kit.remap.suggest.module_groups import ModuleGroup, Shape, group_modules
from port_kit.remap.suggest.number_kinds import is_named_scale, is_quantized
from port_kit.remap.suggest.vocabulary import words

CERTAIN, LIKELY, REJECTED = "certain", "likely", "rejected"

_NAME = 0.3  # names share this much of their words
_MARGIN = 0.2  # all evidence together exceeds any rival's by this much
_NO_EVIDENCE = 0.3  # a match with a lower score has no evidence
_MODULATION = {"modulation", "shift", "table"}
_MIN_TENSORS = 3  # fewer tensors do not show the width of a model


class _Evidence:
    """Properties of tensors that the shapes of one manifest prove.

    Attributes:
        unique: tensors outside of lists of layers that share their number of elements with no other single tensor.
        width: the smallest extent that more than half of the tensors share, or 0.
    """

    def __init__(self, manifest: Mapping[str, TensorSpec]) -> None:
        self.manifest = manifest
        groups = group_modules({name: spec.shape for name, spec in manifest.items()})
        single = [group for group in groups if len(group.instances) == 1]
        counts = Counter(manifest[name].numel for group in single for name in group.tensor_names())
        outside = (name for group in single if group.instances == ((),) for name in group.tensor_names())
        self.unique = {name for name in outside if counts[manifest[name].numel] == 1}
        axes = [extents for spec in manifest.values() if (extents := set(drop_unit_dims(spec.shape)))]
        shared = Counter(extent for extents in axes for extent in extents)
        enough = max(_MIN_TENSORS, len(axes) // 2 + 1)
        self.width = min((extent for extent, count in shared.items() if count >= enough), default=0)

    def fixes_order(self, name: str, *, norm: bool) -> bool:
        """Return True if the elements of a tensor, of a norm or not, can have one order only."""
        spec = self.manifest[name]
        return spec.numel == 1 or norm and drop_unit_dims(spec.shape) == (self.width,)


class Classifier:
    """The confidence of the matches of one search."""

    def __init__(
        self, found: Sequence[Match], source: Mapping[str, TensorSpec], target: Mapping[str, TensorSpec]
    ) -> None:
        self._source, self._target = _Evidence(source), _Evidence(target)
        self._quantized = any(is_quantized(spec.dtype) for spec in (*source.values(), *target.values()))
        self._unsupported = Counter(signature(item.target) for item in found if _is_unsupported(item))
        self._columns: dict[tuple[str, ...], set[int]] = defaultdict(set)
        for item in found:
            self._columns[item.target.parts[:-2]] |= set(_extents(item.target, 1))

    def classify(self, item: Match) -> tuple[str, tuple[str, ...]]:
        """Return the confidence of one match, and the doubts that keep it from being certain."""
        if _is_unsupported(item) and self._unsupported[signature(item.target)] > 1:
            return REJECTED, ("neither names nor surroundings speak for it",)
        tensors = [(name, self._source) for name in item.source.tensor_names()]
        tensors += [(name, self._target) for name in item.target.tensor_names()]
        doubts = (
            *self._doubts_of_values(tensors),
            *_doubts_of_relation(item),
            *_doubts_of_layers(item),
            *self._doubts_of_conventions(item),
            *_doubts_of_names(item),
            *_doubts_of_shapes(item, tensors),
        )
        return LIKELY if doubts else CERTAIN, doubts

    def _doubts_of_values(self, tensors: Sequence[tuple[str, _Evidence]]) -> Iterator[str]:
        quantized = sorted(filter(is_quantized, {evidence.manifest[name].dtype for name, evidence in tensors}))
        if quantized:
            yield f"{' and '.join(quantized)} values may be quantized: they mean nothing without their scale"
        elif self._quantized:
            yield "other tensors are quantized: this one may be a scale or scaled"
        if any(is_named_scale(name) for name, _ in tensors):
            yield "a scale may be stored as its inverse or its logarithm"

    def _doubts_of_conventions(self, item: Match) -> Iterator[str]:
        """Yield the reasons why rows may be ordered differently although the shapes are equal."""
        near = {word for group in (item.source, item.target) for word, distance in group.tokens if distance < 2}
        near |= set(item.source.leaf_words) | set(item.target.leaf_words)
        shapes = [shape for row in item.target.shapes.values() for shape in row.values()]
        if not item.change and any(map(_has_equal_axes, shapes)):
            yield "axes of equal extent: a square shape cannot show whether it is stored transposed"
        if {"q", "k", "v"} <= near:
            yield "rows of a fused projection may be interleaved by head"
        elif near & {"q", "k"}:
            yield "rows of query and key may be permuted for another rotary convention"
        if near & _MODULATION or any(map(_is_norm_projection, (item.source, item.target))):
            yield "chunks of a modulation (shift, scale, gate) may have another order"
        if {"gate", "up"} <= near or self._is_gated(item.target):
            yield "halves of a gated projection may have changed places or be interleaved"

    def _is_gated(self, group: ModuleGroup) -> bool:
        """Return True if a projection is twice as wide as its sibling's input."""
        columns = self._columns[group.parts[:-2]] | self._columns[group.parts[:-1]]
        return "ff" in group.words and any(rows % 2 == 0 and rows // 2 in columns for rows in _extents(group, 0))


def _doubts_of_shapes(item: Match, tensors: Sequence[tuple[str, _Evidence]]) -> Iterator[str]:
    if not all(name in evidence.unique for name, evidence in tensors):
        yield "other tensors or layers have its size: only names and order tell them apart"
    norm = "norm" in item.source.words & item.target.words
    if not all(evidence.fixes_order(name, norm=norm) for name, evidence in tensors):
        yield "its elements may have another order; shapes cannot show it"


def _is_unsupported(item: Match) -> bool:
    """Return True if a match has almost no evidence; the only one of its size is still right by elimination."""
    return item.name == 0.0 and item.score < _NO_EVIDENCE and item.margin < _MARGIN


def _doubts_of_names(item: Match) -> Iterator[str]:
    if _same_name(item):
        return
    if item.name < _NAME:
        yield "the names have little in common"
    if item.margin < _MARGIN:
        yield "others of its shape fit nearly as well"


def _doubts_of_relation(item: Match) -> Iterator[str]:
    if item.change == "swap":
        yield "the halves change places by convention (shift, scale to scale, shift); shapes cannot show it"
    elif item.change:
        yield "transposed as the other linears of the model are; a square shape cannot show it"
    elif item.alignment.relation in ("transpose", "flatten"):
        yield f"the shapes fit by {item.alignment.relation} only"
    kinds = {group.kind for group in (item.source, item.target, *item.source.members, *item.target.members)}
    if "concat" in kinds:
        yield "the parts are taken to lie one after another, not interleaved, in this order"


def _doubts_of_layers(item: Match) -> Iterator[str]:
    if len(item.alignment.pairs) < 2:
        return
    orders = {choice.order for choice in alignments(item.source, item.target)}
    if item.alignment.order == "same":
        if "reversed" in orders and any(map(_is_upward, (item.source, item.target))):
            yield "levels of an upward path count backwards in other code; shapes allow both"
    elif item.alignment.order == "subset":
        yield "the source has more layers than the target"
    elif item.alignment.order == "sequence":
        yield "layers are matched by their order, not by their number"
    elif len(orders) > 1:
        yield "the layers count backwards as their neighbors do; shapes allow both"


def _is_upward(group: ModuleGroup) -> bool:
    """Return True if the name of the outermost list is that of a decoder's upward path."""
    depth = next((depth for depth, part in enumerate(group.parts) if "{}" in part), 0)
    return bool(
        {"up", "upsample"} & {word for part in group.parts[max(0, depth - 1) : depth + 1] for word in words(part)}
    )


def _same_name(item: Match) -> bool:
    """Return True if one name is the end of the other."""
    one, two = sorted((item.source.parts, item.target.parts), key=len)
    return bool(one) and two[-len(one) :] == one


def _is_norm_projection(group: ModuleGroup) -> bool:
    return len(group.parts) > 1 and group.parts[-1].startswith("linear") and "norm" in group.parts[-2]


def _has_equal_axes(shape: Shape) -> bool:
    extents = drop_unit_dims(shape)
    return len(set(extents)) < len(extents)


def _extents(group: ModuleGroup, axis: int) -> list[int]:
    return [shape[axis] for shape in group.shapes.get("weight", {}).values() if len(shape) == 2]
