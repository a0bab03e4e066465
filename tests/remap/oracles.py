"""True conversions of twelve families, derived from the original code, and the rule packs that reproduce them."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from port_kit.manifest import Manifest
from port_kit.remap import RuleSet

PACKS = Path(__file__).parent / "packs"
DATA = Path(__file__).parent.parent / "data" / "oracles"
FAMILIES = tuple(sorted(path.stem for path in PACKS.glob("*.toml")))


@dataclass(frozen=True)
class Oracle:
    """One family: ``map`` says for every target what it is made of, ``dropped`` which sources are not used."""

    family: str
    source: Manifest
    target: Manifest
    map: dict[str, dict[str, Any]]
    dropped: tuple[str, ...]


@cache
def oracle(family: str) -> Oracle:
    """Read the true conversion of a family."""
    data = json.loads(gzip.decompress((DATA / f"{family}.json.gz").read_bytes()))
    source, target = Manifest.from_json(data["source"]), Manifest.from_json(data["target"])
    return Oracle(family, source, target, data["map"], tuple(data["dropped"]))


@cache
def pack(family: str) -> RuleSet:
    """Read the rule pack of a family."""
    return RuleSet.from_file(PACKS / f"{family}.toml")
