"""One pair of groups that the search has found."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace

from port_kit.remap.suggest.alignment import Alignment
from port_kit.remap.suggest.module_groups import Index, ModuleGroup

#: Margin of a pair of groups without other candidates.
NO_RIVAL = 4.0


@dataclass(frozen=True)
class Match:
    """A pair of groups, and how sure the search is of it.

    Attributes:
        source, target: at most one of them is virtual.
        alignment: which instance becomes which.
        score: evidence for the pair.
        margin: by how much the score exceeds that of the best other use of either group (4.0: there is none).
        name: the part of the evidence that comes from names, in [0, 1].
        change: a convention's operation that shapes cannot show: ``swap`` (two halves) or ``transpose`` (a square).
    """

    source: ModuleGroup
    target: ModuleGroup
    alignment: Alignment
    score: float
    margin: float
    name: float
    change: str = ""

    def links(self) -> dict[str, list[str]]:
        """Return the sources of every target tensor that the match explains."""
        return {
            name: self.source.tensors(role, origin)
            for index, origin in self.alignment.pairs.items()
            for role in self.target.roles
            for name in self.target.tensors(role, index)
        }

    def only(self, instances: Container[Index], change: str = "") -> Match:
        """The match of some target instances."""
        pairs = {index: origin for index, origin in self.alignment.pairs.items() if index in instances}
        return replace(self, alignment=replace(self.alignment, pairs=pairs), change=change)
