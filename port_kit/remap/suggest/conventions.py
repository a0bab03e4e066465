"""Differences between code bases that leave no trace in shapes, proposed if names give them away.

* The last adaptive norm: the original projects to (shift, scale), diffusers' ``AdaLayerNormContinuous`` (a ``linear``
  under ``norm_out``, or under the norm of a stream's last block) to (scale, shift).
* diffusers' gated feed-forward (``net.0.proj``) holds the value first and the gate second; llama-style code that fuses
  both into its ``w1`` has the gate first.
* ``Conv1D`` weights are stored transposed; if every other linear of a model is, its square ones are too.

No convention is certain: see :mod:`port_kit.remap.suggest.classify`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from port_kit.remap.suggest.match import Match
from port_kit.remap.suggest.module_groups import INDEX_SLOT, Index, ModuleGroup, Shape


def apply_conventions(found: Sequence[Match]) -> list[Match]:
    """Return the matches, with those split or changed that a convention applies to."""
    modules = {group.parts for item in found for group in (item.source, item.target)}
    widths = {group.parts: _matrix(group)[1] for item in found for group in (item.source, item.target)}
    return _transposed([part for item in found for part in _swapped(_value_first(item, widths), modules)])


def _value_first(item: Match, widths: Mapping[tuple[str, ...], int]) -> Match:
    """Swap the halves if one side is diffusers' gated projection and the other a fused ``w1``."""
    for diffusers, other in ((item.target, item.source), (item.source, item.target)):
        gated = 2 * widths.get((*diffusers.parts[:-2], "2"), 0) == _matrix(diffusers)[0] > 0
        if diffusers.parts[-3:] == ("net", INDEX_SLOT, "proj") and other.parts[-1] in ("w1", "w12") and gated:
            return replace(item, change="swap")
    return item


def _matrix(group: ModuleGroup) -> Shape:
    """The shape of the first matrix of a group, or (0, 0)."""
    return next((shape for shape in group.shapes.get("weight", {}).values() if len(shape) == 2), (0, 0))


def _swapped(item: Match, modules: set[tuple[str, ...]]) -> Iterator[Match]:
    chosen = set() if item.source.members or item.target.members else _continuous_norms(item, modules)
    if not chosen or item.change:
        yield item
        return
    yield item.only(chosen, "swap")
    if rest := set(item.alignment.pairs) - chosen:
        yield item.only(rest)


def _continuous_norms(item: Match, modules: set[tuple[str, ...]]) -> set[Index]:
    """Instances of the target that are the projection of a continuous adaptive norm on one side only."""
    diffusers, other = _norm_linear(item.target), _norm_linear(item.source)
    if diffusers == other:
        return set()
    named = item.target if diffusers else item.source
    if named.parts[-2] == "norm_out" and not any("{}" in part for part in named.parts):
        has_own_norm = (*named.parts[:-1], "norm") in modules
        return set() if has_own_norm or not _even_rows(item.target) else set(item.alignment.pairs)
    chunks = {index: _rows_per_column(item.target, index) for index in item.alignment.pairs}
    doubled = {index for index, count in chunks.items() if count == 2}
    return doubled if len(set(chunks.values())) > 1 else set()


def _norm_linear(group: ModuleGroup) -> bool:
    return len(group.parts) > 1 and group.parts[-1] == "linear" and group.parts[-2].startswith("norm")


def _rows_per_column(group: ModuleGroup, index: Index) -> float:
    shape = group.shapes["weight"].get(index, ()) if "weight" in group.shapes else ()
    return shape[0] / shape[1] if len(shape) == 2 and shape[1] else 0.0


def _even_rows(group: ModuleGroup) -> bool:
    return all(shape and shape[0] % 2 == 0 for row in group.shapes.values() for shape in row.values())


def _transposed(found: Sequence[Match]) -> list[Match]:
    """Transpose square matrices if all other linears with the same parameter names are transposed.

    Linears of layers and those outside count apart (GPT-2's head is not stored as its layers are), embeddings not at
    all. If there are no others, a flax ``kernel`` has its inputs first and a torch ``weight`` its outputs.
    """
    groups: dict[tuple[str, str, bool], list[Match]] = defaultdict(list)
    for item in found:
        if _is_linear(item):
            groups[_stored_as(item)].append(item)
    transposed: set[int] = set()
    for (given, wanted, _), items in groups.items():
        uneven = [item for item in items if not _square(item)]
        transposes = all(item.alignment.relation == "transpose" for item in uneven)
        if transposes and (uneven or {given, wanted} == {"kernel", "weight"}):
            transposed |= {id(item) for item in items if _square(item)}
    return [replace(item, change="transpose") if id(item) in transposed else item for item in found]


def _stored_as(item: Match) -> tuple[str, str, bool]:
    """Names of the parameter of a linear on both sides, and True if it is in a list of layers."""
    leaves = [group.first_name("weight").rpartition(".")[2] for group in (item.source, item.target)]
    return leaves[0], leaves[1], any(INDEX_SLOT in part for part in item.target.parts)


def _is_linear(item: Match) -> bool:
    groups = (item.source, item.target)
    if any(group.members or "weight" not in group.roles for group in groups):
        return False
    embeds = any({"token", "position"} & group.words for group in groups) or item.target.leaf_words == ("embed",)
    return not embeds and all(len(item.target.shapes["weight"][index]) == 2 for index in item.alignment.pairs)


def _square(item: Match) -> bool:
    return all(len(set(item.target.shapes["weight"][index])) == 1 for index in item.alignment.pairs)
