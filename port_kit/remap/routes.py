"""Routes: where the tensors of a layer go, once those of another layer have gone there.

Between two copies of some megabytes nothing is left in the processor's caches, so every line of Python that a tensor
costs on its way counts several times. The first layer is worked out in full; a tensor of another layer then takes two
look-ups, and its books are done at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from port_kit.remap.boxes import Box, slices
from port_kit.remap.lower import Lowering, Write
from port_kit.remap.names import PROBES, section
from port_kit.remap.steps import Step, copy_through

if TYPE_CHECKING:
    import torch

    from port_kit.manifest import TensorSpec
    from port_kit.remap.targets import Target


@dataclass(frozen=True)
class Place:
    """A box of a parameter, as the cheapest view of it.

    Attributes:
        narrow: ``(axis, start, length)`` where one axis is cut; None where none is, or several are.
        index: the box where several axes are cut.
    """

    narrow: tuple[int, int, int] | None
    index: tuple[slice, ...] | None

    @classmethod
    def of(cls, box: Box, shape: tuple[int, ...]) -> Place:
        """The view of a box in a shape."""
        cut = [axis for axis, span in enumerate(box) if span != (0, shape[axis])]
        if len(cut) != 1:
            return cls(None, slices(box, shape))
        start, stop = box[cut[0]]
        return cls((cut[0], start, stop - start), None)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The box of a tensor."""
        if self.narrow is not None:
            return tensor.narrow(*self.narrow)
        return tensor if self.index is None else tensor[self.index]


class Route:
    """One tensor of a layer on its way into a target of the same number.

    Attributes:
        before, after: the target's name around the number.
        shape, dtype: those of the source.
        spec: that of the target; targets that are alike share one object.
        write: the write of the layer in which the route was found; only its names are another layer's.
        steps: those of the write.
        place: the write's region in a target without a loader of its own.
        rule: number of the rule.
    """

    __slots__ = ("after", "before", "dtype", "place", "rule", "shape", "spec", "steps", "write")

    def __init__(self, ends: tuple[str, str], tensor: torch.Tensor, target: Target, write: Write, rule: int) -> None:
        self.before, self.after = ends
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.spec: TensorSpec = target.spec
        self.write, self.rule = write, rule
        self.steps: tuple[Step, ...] = write.steps
        self.place = Place.of(write.region, target.spec.shape)

    def put(self, target: Target, tensor: torch.Tensor) -> None:
        """Copy a tensor into its place in a target without a loader."""
        place = self.place.view(target.tensor.data)
        if self.steps:
            copy_through(place, tensor, self.steps)
        else:
            place.copy_(tensor)


class Routes:
    """The routes of one load.

    Args:
        lowering: the rules that the load follows.
    """

    def __init__(self, lowering: Lowering) -> None:
        self._lowering = lowering
        self._literal = lowering.matcher.literal
        self._tables: dict[str, dict[str, Route]] = {}
        self._table: dict[str, Route] = {}
        self._start, self._size = "\0", 1
        #: the layer number of the name that was looked for last
        self.number = ""

    def find(self, name: str) -> Route | None:
        """The route of a name, where another layer has shown it."""
        if not name.startswith(self._start):
            self._turn(name)
        return self._table.get(name[self._size :])

    def _turn(self, name: str) -> None:
        """Go to another layer."""
        found = section(name, self._literal) if self._literal is not None else None
        head, self.number = found or (name, "")
        self._start = f"{head}{self.number}." if found else "\0"
        self._size = len(self._start) if found else len(name)
        self._table = self._tables.setdefault(head if found else "\0", {})

    def learn(self, name: str, tensor: torch.Tensor, target: Target, write: Write, rule: int) -> None:
        """Keep the way that a name took, where the layer number goes through unchanged and changes nothing else.

        Args:
            name: that :meth:`find` has just been asked for.
            tensor: what came under it.
            target: where it went.
            write: its only write, placed.
            rule: number of the only rule that matches it.
        """
        ends = self._ends(name, rule)
        if ends is not None and self.number.join(ends) == write.target:
            self._table[name[self._size :]] = Route(ends, tensor, target, write, rule)

    def _ends(self, name: str, rule: int) -> tuple[str, str] | None:
        if not self.number:
            return None
        head, tail = self._start[: -len(self.number) - 1], name[self._size :]
        made = [self._lowering.fill(rule, f"{head}{probe}.{tail}") for probe in PROBES]
        one, other = (
            None if names is None else (*names[0].split(probe), names[1])
            for names, probe in zip(made, PROBES, strict=True)
        )
        return (one[0], one[1]) if one is not None and len(one) == 3 and one == other else None
