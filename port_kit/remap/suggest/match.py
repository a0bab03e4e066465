"""One pair of units that the search has found."""

from __future__ import annotations

from dataclasses import dataclass

from port_kit.remap.suggest.shapes import Alignment
from port_kit.remap.suggest.units import Unit


@dataclass(frozen=True)
class Match:
    """A pair of units, and how sure the search is of it.

    Attributes:
        source, target: at most one of them is virtual.
        alignment: which instance becomes which.
        score: evidence for the pair.
        margin: by how much the score exceeds that of the best other use of either unit (4.0: there is none).
        name: the part of the evidence that comes from names, in [0, 1].
        round: 1 for templates, 2 for single tensors.
    """

    source: Unit
    target: Unit
    alignment: Alignment
    score: float
    margin: float
    name: float
    round: int
