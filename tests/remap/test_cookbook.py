"""Rules of the cookbook are in the rule sets."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from port_kit.remap import Rule, RuleSet
from port_kit.remap.export import convert
from port_kit.testing.rules import assert_covers, assert_round_trip
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


def test_the_pack_of_rotary_pairs_moves_each_row_of_a_head() -> None:
    """The rule of the page, with the sizes on the page; head 0 has the rows 0 to 5, head 1 the rows 6 to 11."""
    blocks = re.findall(r"```toml\n(.*?)```", COOKBOOK.read_text(encoding="utf-8"), re.DOTALL)
    (page,) = [RuleSet.from_toml(block) for block in blocks if "(h d two) i" in block]
    pack = RuleSet.from_file(RULE_SETS / "orders" / "rotary_pairs.toml")
    assert set(page) < set(pack) and page.sizes == pack.sizes
    source = {f"layers.0.attn.{part}.weight": torch.arange(12.0)[:, None].repeat(1, 3) for part in "qkv"}
    target = [f"blocks.0.attn.to_{part}.weight" for part in "qkv"]
    plan = assert_covers(pack, *(manifest_of(dict.fromkeys(side, (12, 3))) for side in (source, target)))
    assert_round_trip(plan)
    found = {name: [int(row) for row in value[:, 0]] for name, value in convert(plan, source)}
    moved = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert [found[f"blocks.0.attn.to_{part}.weight"] for part in "qk"] == [moved, moved]
    assert found["blocks.0.attn.to_v.weight"] == list(range(12))
