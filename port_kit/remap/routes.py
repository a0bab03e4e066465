"""Routes: where the tensors of a layer go, once those of another layer have gone there.

Between two copies of some megabytes nothing is left in the processor's caches, so every line of Python that a tensor
costs on its way counts several times. The first layer is worked out in full. When the second begins, a seat is kept
for every tensor of every other layer, in one go: each then takes one look-up, and its books are done at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from port_kit.remap.boxes import Box, Shape, slices, whole
from port_kit.remap.lower import Lowering, Write
from port_kit.remap.names import PROBES
from port_kit.remap.steps import copy_through

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from port_kit.remap.targets import Target

#: Gives a piece to a target's own loader.
Store = Callable[["Target", Write, "Tensor"], None]
#: What names that differ in one number have in common: what stands before it, and what behind its dot.
_Frame = tuple[str, str]


class Route:
    """One tensor of a layer on its way into the target of the same layer.

    Attributes:
        shape, dtype: those of the source.
        write: the write of the layer in which the route was found; only its names are another layer's.
        rule: number of the rule.
        index: the write's region as an index of the target; None where it is all of it.
        slot: the slot for which a target's own loader takes the tensor as it is; None where it has to be cut first.
        store: what cuts it then.
    """

    __slots__ = ("dtype", "index", "rule", "shape", "slot", "steps", "store", "write")

    def __init__(self, shown: _Shown, store: Store) -> None:
        write, spec = shown.write, shown.target.spec
        self.shape, self.dtype = shown.shape, shown.dtype
        self.write, self.rule, self.steps, self.store = write, shown.rule, write.steps, store
        self.index = index_of(write.region, spec.shape)
        slots: Mapping[str, Box] = spec.slots or {"": whole(spec.shape)}
        as_it_is = not write.steps and "." not in write.slot and slots.get(write.slot) == write.region
        self.slot = write.slot if as_it_is else None

    def put(self, target: Target, tensor: Tensor) -> None:
        """Put a tensor to where it goes."""
        if target.loader is None:
            into = target.tensor.data
            if self.index is not None:
                into = into[self.index]
            if self.steps:
                copy_through(into, tensor, self.steps)
            else:
                into.copy_(tensor)
        elif self.slot is not None:
            target.load(self.slot, tensor)
        else:
            self.store(target, self.write, tensor)


#: What is kept for one tensor that has not come yet: its name, where it goes, and how.
Seat = tuple[str, "Target", Route]


class _Shown(NamedTuple):
    """What a layer has shown: its tensor's shape and dtype, where it went, and the only rule that matches it."""

    shape: torch.Size
    dtype: torch.dtype
    target: Target
    write: Write
    rule: int


class Routes:
    """The routes of one load.

    Args:
        lowering: the rules that the load follows.
        targets: all targets of the module.
        store: gives a piece to a target's own loader.

    Attributes:
        seats: ``{source: seat}`` for the tensors whose way another layer has shown; None for one that has come.
    """

    def __init__(self, lowering: Lowering, targets: Mapping[str, Target], store: Store) -> None:
        self.seats: dict[str, Seat | None] = {}
        self._lowering, self._targets, self._store = lowering, targets, store
        self._shown: list[_Shown] = []
        self._frames: set[_Frame] = set()
        self._known: set[object] = set()
        self._ends: dict[object, tuple[str, str, str] | None] = {}
        self._numbers: dict[str, list[str]] = {}

    def show(self, tensor: Tensor, target: Target, write: Write, rule: int) -> None:
        """Note where a tensor went.

        Args:
            tensor: the tensor.
            target: where it went.
            write: its only write, placed.
            rule: number of the only rule that matches it.
        """
        self._shown.append(_Shown(tensor.shape, tensor.dtype, target, write, rule))
        self._frames.update((head, tail) for head, _, tail in _numbered(write.source))

    def learn(self, name: str, seen: Container[str]) -> bool:
        """Keep seats for all that was shown, where something shown was like this name; returns whether it was.

        Args:
            name: a name that has no seat that fits.
            seen: names that have come without a seat, and get none.
        """
        if not any((head, tail) in self._frames for head, _, tail in _numbered(name)):
            return False
        for shown in self._shown:
            self._keep_seats(shown, seen)
        self._shown.clear()
        self._frames.clear()
        return True

    def _keep_seats(self, shown: _Shown, seen: Container[str]) -> None:
        """Keep seats for the other layers, where the layer number goes through unchanged and changes nothing else."""
        spec = shown.target.spec
        numbered = (
            (head, tail, self._ends_of(head, tail, shown.rule)) for head, _, tail in _numbered(shown.write.source)
        )
        head, tail, ends = next((found for found in numbered if found[2] is not None), ("", "", None))
        key = (head, tail, shown.dtype, shown.shape, id(spec))
        if ends is None or key in self._known:
            return
        self._known.add(key)
        route, (before, after, slot) = Route(shown, self._store), ends
        literal, seats, targets = self._lowering.matcher.literal, self.seats, self._targets
        for number in self._numbers_after(before):
            target = targets.get(f"{before}{number}{after}")
            if target is None or target.spec is not spec:
                continue
            name = f"{head}{number}.{tail}"
            if name in seen or name in seats and seats[name] is None:
                continue
            if (literal is None or number in literal) and self._fill(name, route.rule) != (target.name, slot):
                continue
            seats[name] = (name, target, route)

    def _numbers_after(self, before: str) -> list[str]:
        """The numbers that stand in names of targets after this start."""
        if before not in self._numbers:
            found = re.findall(rf"^{re.escape(before)}(\d+)", "\n".join(self._targets), re.MULTILINE)
            self._numbers[before] = list(dict.fromkeys(found))
        return self._numbers[before]

    def _ends_of(self, head: str, tail: str, rule: int) -> tuple[str, str, str] | None:
        """The target's name around the number, and its slot; None where the number does something else."""
        key = (head, tail, rule)
        if key not in self._ends:
            found = {self._around(probe, self._fill(f"{head}{probe}.{tail}", rule)) for probe in PROBES}
            self._ends[key] = found.pop() if len(found) == 1 else None
        return self._ends[key]

    @staticmethod
    def _around(number: str, names: tuple[str, str] | None) -> tuple[str, str, str] | None:
        pieces = names[0].split(number) if names is not None else []
        return (pieces[0], pieces[1], names[1]) if names is not None and len(pieces) == 2 else None

    def _fill(self, name: str, rule: int) -> tuple[str, str] | None:
        """The target and the slot that a rule gives a name; None where another rule matches."""
        return self._lowering.fill(rule, name) if self._lowering.matches(name) == (rule,) else None


def _numbered(name: str) -> Iterator[tuple[str, str, str]]:
    """A name's numbers that may be a layer's, each with what stands before it and behind its dot."""
    at = 0
    for part in name.split(".")[:-1]:
        end = at + len(part) + 1
        if part.isdecimal():
            yield name[:at], part, name[end:]
        at = end


def index_of(box: Box, shape: Shape) -> slice | tuple[slice, ...] | None:
    """A box as the shortest index of a tensor of this shape; None where it is all of it."""
    index = slices(box, shape)
    if index is None:
        return None
    cut = max(axis for axis, span in enumerate(box) if span != (0, shape[axis]))
    return index[0] if cut == 0 else index[: cut + 1]
