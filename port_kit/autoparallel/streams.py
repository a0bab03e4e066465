"""Token streams, found by comparing the shapes of runs with more image, text and audio tokens.

The *sizes* of a dimension are its lengths in all runs. A dimension whose sizes differ counts tokens. Dimensions of
equal sizes hold the same tokens. A dimension whose sizes are the sum of several streams' sizes holds their
concatenation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from port_kit.autoparallel.observe import Observation, Shapes
from port_kit.autoparallel.plan import TokenAxis
from port_kit.autoparallel.subject import TokenScale

Sizes = tuple[int, ...]

#: Runs whose shapes are compared, by the modality that has more tokens; the first is the base.
RUNS: dict[str, TokenScale] = {
    "": TokenScale(),
    "image": TokenScale(image=1),
    "text": TokenScale(text=1),
    "audio": TokenScale(audio=1),
    "batch": TokenScale(batch=1),
}
#: The run with a larger batch. A dimension that grows with it alone counts no tokens.
BATCH = "batch"
#: Streams that one dimension may consist of.
MAX_PARTS = 3


@dataclass(frozen=True)
class Observed:
    """Observations of all :data:`RUNS` of one module, in order. All make the same calls.

    Attributes:
        runs: the observations.
        mixing: patterns of modules that mix tokens without a known attention function.
    """

    runs: tuple[Observation, ...]
    mixing: tuple[str, ...] = ()

    def sizes(self, pick: Callable[[Observation], Shapes]) -> dict[tuple[str, int], Sizes]:
        """Return the sizes of all dimensions and integers that grow with tokens; see :meth:`all_sizes`."""
        return {key: sizes for key, sizes in self.all_sizes(pick).items() if set(growth(sizes)) - {BATCH}}

    def all_sizes(self, pick: Callable[[Observation], Shapes]) -> dict[tuple[str, int], Sizes]:
        """Return the sizes of all dimensions and integers.

        Args:
            pick: select the shapes of one value from an observation.

        Returns:
            Sizes by path and dimension; -1 for an integer.
        """
        first, *others = (pick(run) for run in self.runs)
        found: dict[tuple[str, int], Sizes] = {}
        for path, shape in first.items():
            rest = [other.get(path) for other in others]
            if isinstance(shape, int):
                if all(isinstance(one, int) for one in rest):
                    found[path, -1] = (shape, *rest)  # type: ignore[arg-type]
            elif all(isinstance(one, tuple) and len(one) == len(shape) for one in rest):
                for dim, size in enumerate(shape):
                    found[path, dim] = (size, *(one[dim] for one in rest))  # type: ignore[index]
        return found


def growth(sizes: Sizes) -> tuple[str, ...]:
    """Return the modalities with which a dimension grows."""
    names = list(RUNS)
    return tuple(names[i] for i in range(1, len(sizes)) if sizes[i] != sizes[0])


class Naming:
    """Names of streams by their sizes, unique within a plan."""

    def __init__(self) -> None:
        self.names: dict[Sizes, str] = {}

    def name(self, sizes: Sizes) -> str:
        """Return the name of a stream; a new one is named after the modalities with which it grows."""
        if sizes not in self.names:
            base = "_".join(growth(sizes))
            taken = set(self.names.values())
            numbered = (base if index == 1 else f"{base}_{index}" for index in itertools.count(1))
            self.names[sizes] = next(name for name in numbered if name not in taken)
        return self.names[sizes]


def basic_streams(found: Iterable[Sizes]) -> list[Sizes]:
    """Return the streams that are not concatenations of others."""
    unique = sorted(set(found))
    return [one for one in unique if not _sums([other for other in unique if other != one], one)]


def decompose(sizes: Sizes, basic: Sequence[Sizes], order: int) -> tuple[Sizes, ...] | None:
    """Return the streams that a dimension consists of, or None.

    Args:
        sizes: sizes of the dimension.
        basic: streams that are sharded.
        order: which order of several possible ones.
    """
    if sizes in basic:
        return (sizes,)
    options = _sums(basic, sizes)
    return options[order % len(options)] if options else None


def _sums(parts: Sequence[Sizes], total: Sizes) -> list[tuple[Sizes, ...]]:
    return [
        chosen
        for count in range(2, MAX_PARTS + 1)
        for chosen in itertools.permutations(parts, count)
        if tuple(map(sum, zip(*chosen, strict=True))) == total
    ]


def with_complete_parts(sizes: Sizes, basic: Sequence[Sizes], order: int) -> tuple[Sizes | None, ...]:
    """Return the streams of keys; None stands for keys that are complete on every rank.

    Args:
        sizes: numbers of keys.
        basic: streams that are sharded.
        order: which order of several possible ones.
    """
    parts = decompose(sizes, basic, order)
    if parts is not None:
        return parts
    options: list[tuple[Sizes | None, ...]] = []
    for count in (1, 2):
        for chosen in itertools.permutations(basic, count):
            rest = [size - sum(part[i] for part in chosen) for i, size in enumerate(sizes)]
            if all(value > 0 for value in rest) and _is_growth_consistent(rest, sizes, chosen):
                options += [(None, *chosen), (*chosen, None)]
    return options[order % len(options)] if options else (None,)


def _is_growth_consistent(rest: Sequence[int], sizes: Sizes, chosen: Sequence[Sizes]) -> bool:
    """Return True if what remains does not grow with the modalities of the sharded part."""
    used = {name for part in chosen for name in growth(part)}
    return not used & set(growth(tuple(rest)))


def axes(
    found: dict[tuple[str, int], Sizes], basic: Sequence[Sizes], order: int, naming: Naming
) -> tuple[TokenAxis, ...]:
    """Return the axes of values along which they are sharded, at most one per value.

    Args:
        found: sizes of dimensions, as from :meth:`Observed.sizes`.
        basic: streams that are sharded.
        order: order of the streams in concatenations.
        naming: names of streams.
    """
    result: dict[str, TokenAxis] = {}
    for (path, dim), sizes in found.items():
        parts = decompose(sizes, basic, order)
        if parts is not None and path not in result:
            result[path] = TokenAxis(path=path, dim=dim, streams=tuple(map(naming.name, parts)))
    return tuple(result.values())


def grid_axes(found: dict[tuple[str, int], Sizes], basic: Sequence[Sizes], naming: Naming) -> tuple[TokenAxis, ...]:
    """Return the axes of values that hold the grid of a stream: rows and columns, or frames, rows and columns.

    The product of consecutive dimensions, or of consecutive integer arguments, is the number of tokens in all runs.

    Args:
        found: sizes of all dimensions, as from :meth:`Observed.all_sizes`.
        basic: streams that are sharded.
        naming: names of streams.
    """
    integers = [key for key in found if key[1] < 0]
    tensors = [
        list(keys) for _, keys in itertools.groupby((key for key in found if key[1] >= 0), key=lambda key: key[0])
    ]
    candidates = (_grid(keys, found, basic, naming) for keys in (integers, *tensors))
    return tuple(axis for axis in candidates if axis is not None)


def _grid(
    keys: list[tuple[str, int]], found: dict[tuple[str, int], Sizes], basic: Sequence[Sizes], naming: Naming
) -> TokenAxis | None:
    for count, start in itertools.product((3, 2), range(len(keys))):
        chosen = keys[start : start + count]
        if len(chosen) < count:
            continue
        product = tuple(math.prod(sizes) for sizes in zip(*(found[key] for key in chosen), strict=True))
        if product in basic and all(size > 1 for key in chosen for size in found[key]):
            path, dim = chosen[0]
            return TokenAxis(path=path, dim=dim, streams=(naming.name(product),), grid=count)
    return None
