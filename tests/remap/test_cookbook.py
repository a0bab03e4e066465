"""The cookbook shows rules that are really in the packs."""

from __future__ import annotations

import re
from pathlib import Path

from port_kit.remap import Rule, RuleSet
from tests.remap.oracles import FAMILIES, pack

COOKBOOK = Path(__file__).parents[2] / "docs" / "cookbook.md"
FP8 = Path(__file__).parent / "packs" / "fp8"


def shown() -> list[Rule]:
    blocks = re.findall(r"```toml\n(.*?)```", COOKBOOK.read_text(encoding="utf-8"), re.DOTALL)
    return [rule for block in blocks for rule in RuleSet.from_toml(block)]


def test_every_rule_of_the_cookbook_is_in_a_pack() -> None:
    known = {rule for family in FAMILIES for rule in pack(family)}
    known |= {rule for file in FP8.glob("*.toml") for rule in RuleSet.from_file(file)}
    assert len(shown()) >= 15
    assert [rule.source for rule in shown() if rule not in known] == []


def test_every_pack_is_in_the_cookbook() -> None:
    text = COOKBOOK.read_text(encoding="utf-8")
    assert [family for family in FAMILIES if f"(../tests/remap/packs/{family}.toml)" not in text] == []
