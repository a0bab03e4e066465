"""Rules of the cookbook are in the rule sets."""

from __future__ import annotations

import re
from pathlib import Path

from port_kit.remap import Rule, RuleSet
from tests.remap.conversions import FAMILIES, rule_set
from tests.remap.shapes import manifest_of

COOKBOOK = Path(__file__).parents[2] / "docs" / "cookbook.md"
RULE_SETS = Path(__file__).parent / "rule_sets"


def shown() -> list[Rule]:
    blocks = re.findall(r"```toml\n(.*?)```", COOKBOOK.read_text(encoding="utf-8"), re.DOTALL)
    return [rule for block in blocks for rule in RuleSet.from_toml(block)]


def test_every_rule_of_the_cookbook_is_in_a_pack() -> None:
    known = {rule for family in FAMILIES for rule in rule_set(family)}
    known |= {rule for file in RULE_SETS.glob("*/*.toml") for rule in RuleSet.from_file(file)}
    assert len(shown()) >= 15
    assert [rule.source for rule in shown() if rule not in known] == []


def test_every_pack_is_in_the_cookbook() -> None:
    text = COOKBOOK.read_text(encoding="utf-8")
    assert [family for family in FAMILIES if f"(../tests/remap/rule_sets/{family}.toml)" not in text] == []


def test_the_pack_of_copies_fills_both_targets() -> None:
    rules = RuleSet.from_file(RULE_SETS / "copies" / "lumina_next.toml")
    shapes = {f"layers.{at}.attn{copy}.to_q.weight": (4, 4) for at in range(2) for copy in (1, 2)}
    plan = rules.compile(
        manifest_of({f"layers.{at}.attention.wq.weight": (4, 4) for at in range(2)}), manifest_of(shapes)
    )
    assert {task.target for task in plan.tasks} == set(shapes)
