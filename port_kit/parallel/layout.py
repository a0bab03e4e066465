"""Degrees of parallelism, by vLLM-Omni's names.

Written as ``tp2``, ``ulysses2xring2`` or ``hsdp2xcfg2``; ``single`` is one rank. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from port_kit.errors import ParallelError
from port_kit.escape import quoted

#: Fields of :class:`Layout` and the corresponding fields of ``DiffusionParallelConfig``.
CONFIG_NAMES = {
    "tp": "tensor_parallel_size",
    "ulysses": "ulysses_degree",
    "ring": "ring_degree",
    "allgather": "allgather_degree",
    "cfg": "cfg_parallel_size",
    "hsdp": "hsdp_shard_size",
}
#: Kinds in the order of the text of a layout.
_ORDER = ("tp", "hsdp", "ulysses", "ring", "allgather", "cfg")
#: Values of ``ulysses_mode`` of ``DiffusionParallelConfig``; the second one pads uneven heads.
ULYSSES_MODES = ("strict", "advanced_uaa")
#: Suffix of a Ulysses degree whose ranks pad heads that they cannot share evenly.
UAA = "-uaa"
_DEGREE = re.compile(rf"([a-z]+)(\d+)({UAA})?")


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; a degree of 1 disables a kind.

    Attributes:
        tp: ranks that split each matrix.
        hsdp: ranks that shard the parameters of each block; independent of the other kinds' groups.
        ulysses: ranks that split a sequence and exchange heads.
        ring: ranks that split a sequence and circulate keys and values.
        allgather: ranks that split a sequence and all-gather keys and values.
        cfg: ranks that split the guidance branches.
        uaa: True if Ulysses pads heads that its ranks cannot share evenly (``ulysses_mode="advanced_uaa"``).
    """

    tp: int = 1
    hsdp: int = 1
    ulysses: int = 1
    ring: int = 1
    allgather: int = 1
    cfg: int = 1
    uaa: bool = False

    def __post_init__(self) -> None:
        for kind in CONFIG_NAMES:
            degree = getattr(self, kind)
            if not isinstance(degree, int) or degree < 1:
                raise _invalid(f"{kind}: expected an integer of at least 1, got {quoted(degree)}")
        if self.uaa and self.ulysses == 1:
            raise _invalid(f"{UAA} is a mode of ulysses, which is off", f"write it as in ulysses2{UAA}")
        if self.allgather > 1 and self.ulysses * self.ring > 1:
            raise _invalid("allgather cannot be combined with ulysses or ring", "use only one of them")
        if self.hsdp > 1 and self.tp > 1:
            raise _invalid("hsdp cannot be combined with tp", "use hsdp with ulysses, ring, allgather or cfg")
        if self.hsdp > 1 and self._others > 1 and self._others % self.hsdp:
            raise _invalid(
                f"hsdp {self.hsdp} does not divide the {self._others} ranks of the other kinds",
                f"use hsdp {' or '.join(str(d) for d in divisors(self._others) if d > 1)}",
            )

    @property
    def sequence(self) -> int:
        """Number of ranks that split a sequence."""
        return self.ulysses * self.ring * self.allgather

    @property
    def world(self) -> int:
        """Total number of ranks."""
        return self._others if self._others > 1 else self.hsdp

    @property
    def _others(self) -> int:
        return self.tp * self.sequence * self.cfg

    @property
    def parallel_config(self) -> dict[str, Any]:
        """Arguments of ``Omni`` for this layout, and fields of ``DiffusionParallelConfig``.

        ``Omni`` ignores an argument ``parallel_config`` if it knows the class that ``model_index.json`` names.
        """
        config: dict[str, Any] = {CONFIG_NAMES[kind]: degree for kind, degree in self.degrees.items()}
        if self.hsdp > 1:
            config |= {"use_hsdp": True, "hsdp_replicate_size": self.world // self.hsdp}
        if self.uaa:
            config["ulysses_mode"] = ULYSSES_MODES[1]
        return config

    @property
    def degrees(self) -> Mapping[str, int]:
        """Degrees greater than 1, by kind."""
        return {kind: degree for kind in _ORDER if (degree := getattr(self, kind)) > 1}

    def __str__(self) -> str:
        parts = (
            f"{kind}{degree}{UAA if self.uaa and kind == 'ulysses' else ''}" for kind, degree in self.degrees.items()
        )
        return "x".join(parts) or "single"

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Parse a layout such as ``tp2xulysses2`` or ``ulysses2-uaa``.

        Raises:
            ParallelError: an unknown or repeated kind, or a combination that vLLM-Omni does not support.
        """
        degrees: dict[str, int] = {}
        uaa = False
        for part in text.split("x") if text != "single" else ():
            match = _DEGREE.fullmatch(part.strip())
            known = match and match[1] in CONFIG_NAMES and match[1] not in degrees
            if not match or not known or (match[3] and match[1] != "ulysses"):
                raise _invalid(
                    f"{quoted(part)} in {quoted(text)} is not a degree, or its kind is repeated",
                    f"write the layout as in tp2xulysses2; kinds: {', '.join(CONFIG_NAMES)}",
                )
            degrees[match[1]] = int(match[2])
            uaa |= bool(match[3])
        return cls(**degrees, uaa=uaa)


def divisors(number: int) -> list[int]:
    """Return all divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _invalid(message: str, hint: str = "") -> ParallelError:
    return ParallelError(message, code="parallel_degree", hint=hint)
