"""Known conversions of twelve families, derived from the original code, and the rule sets that reproduce them."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from port_kit.manifest import Manifest
from port_kit.remap import RuleSet

RULE_SETS = Path(__file__).parent / "rule_sets"
DATA = Path(__file__).parent.parent / "data" / "conversions"
FAMILIES = tuple(sorted(path.stem for path in RULE_SETS.glob("*.toml")))


@dataclass(frozen=True)
class Conversion:
    """One family: ``map`` has the sources of every target, ``dropped`` the unused sources."""

    family: str
    source: Manifest
    target: Manifest
    map: dict[str, dict[str, Any]]
    dropped: tuple[str, ...]


@cache
def conversion(family: str) -> Conversion:
    """Read the true conversion of a family."""
    data = json.loads(gzip.decompress((DATA / f"{family}.json.gz").read_bytes()))
    source, target = Manifest.from_json(data["source"]), Manifest.from_json(data["target"])
    return Conversion(family, source, target, data["map"], tuple(data["dropped"]))


@cache
def rule_set(family: str) -> RuleSet:
    """Read the rule set of a family."""
    return RuleSet.from_file(RULE_SETS / f"{family}.toml")
