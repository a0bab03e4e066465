"""Differences between code bases that leave no trace in shapes, proposed where their names give them away.

* The last adaptive norm: the original projects to (shift, scale), diffusers' ``AdaLayerNormContinuous`` (a ``linear``
  under ``norm_out``, or under the norm of a stream's last block) to (scale, shift).
* ``Conv1D`` weights are stored transposed; where every other linear of a model is, its square ones are too.

Nothing here is certain: see :mod:`port_kit.remap.suggest.confidence`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from port_kit.remap.suggest.match import Match
from port_kit.remap.suggest.units import Index, Unit


def apply_conventions(found: Sequence[Match]) -> list[Match]:
    """The same matches, those split or changed that a convention speaks about."""
    modules = {unit.parts for item in found for unit in (item.source, item.target)}
    return _transposed([part for item in found for part in _swapped(item, modules)])


def _swapped(item: Match, modules: set[tuple[str, ...]]) -> Iterator[Match]:
    chosen = set() if item.source.members or item.target.members else _continuous_norms(item, modules)
    rest = set(item.alignment.pairs) - chosen
    if not chosen:
        yield item
        return
    yield item.only(chosen, "swap")
    if rest:
        yield item.only(rest)


def _continuous_norms(item: Match, modules: set[tuple[str, ...]]) -> set[Index]:
    """Instances of the target that are the projection of a continuous adaptive norm on one side only."""
    ours, theirs = _norm_linear(item.target), _norm_linear(item.source)
    if ours == theirs:
        return set()
    named = item.target if ours else item.source
    if named.parts[-2] == "norm_out" and not any("{}" in part for part in named.parts):
        has_own_norm = (*named.parts[:-1], "norm") in modules
        return set() if has_own_norm or not _even_rows(item.target) else set(item.alignment.pairs)
    chunks = {index: _rows_per_column(item.target, index) for index in item.alignment.pairs}
    doubled = {index for index, count in chunks.items() if count == 2}
    return doubled if len(set(chunks.values())) > 1 else set()


def _norm_linear(unit: Unit) -> bool:
    return len(unit.parts) > 1 and unit.parts[-1] == "linear" and unit.parts[-2].startswith("norm")


def _rows_per_column(unit: Unit, index: Index) -> float:
    shape = unit.shapes["weight"].get(index, ()) if "weight" in unit.shapes else ()
    return shape[0] / shape[1] if len(shape) == 2 and shape[1] else 0.0


def _even_rows(unit: Unit) -> bool:
    return all(shape and shape[0] % 2 == 0 for row in unit.shapes.values() for shape in row.values())


def _transposed(found: Sequence[Match]) -> list[Match]:
    """Square linears follow the others of the model, where those agree."""
    linears = [item for item in found if item.target.roles == ("bias", "weight") and _matrix(item)]
    uneven = [item for item in linears if not _square(item)]
    if not uneven or any(item.alignment.relation != "transpose" for item in uneven):
        return list(found)
    square = {id(item) for item in linears if _square(item)}
    return [replace(item, change="transpose") if id(item) in square else item for item in found]


def _matrix(item: Match) -> bool:
    return all(len(item.target.shapes["weight"][index]) == 2 for index in item.alignment.pairs)


def _square(item: Match) -> bool:
    return all(len(set(item.target.shapes["weight"][index])) == 1 for index in item.alignment.pairs)
