"""The rule sets reproduce the known conversions and their inverses, and detect every mutation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from port_kit.manifest import Manifest
from port_kit.remap import Rule, RuleSet
from port_kit.remap.export import convert
from port_kit.remap.invert import invert
from port_kit.remap.names import split_numbers
from port_kit.remap.plan import Plan, check
from port_kit.remap.resolve import CopyTask
from port_kit.reports.plan_json import plan_map
from port_kit.testing.rules import assert_covers, assert_mutations_caught, assert_round_trip, values
from tests.remap.conversions import FAMILIES, conversion, rule_set


def plan_of(family: str) -> Plan:
    truth = conversion(family)
    return assert_covers(rule_set(family), truth.source, truth.target)


def test_there_is_a_pack_for_each_of_twelve_families() -> None:
    assert len(FAMILIES) == 12


@pytest.mark.parametrize("family", FAMILIES)
def test_pack_is_the_true_conversion(family: str) -> None:
    plan, truth = plan_of(family), conversion(family)
    assert plan_map(plan) == truth.map
    assert set(plan.dropped) == set(truth.dropped)


@pytest.mark.parametrize("family", FAMILIES)
def test_pack_leads_back_bit_for_bit(family: str) -> None:
    assert_round_trip(plan_of(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_inverse_rules_restore_the_source(family: str) -> None:
    plan, truth = plan_of(family), conversion(family)
    back = invert(plan).compile(truth.target, truth.source)
    given = values(truth.source)
    restored = dict(convert(back, dict(convert(plan, given))))
    assert set(restored) == set(truth.source) - set(truth.dropped)
    assert all(torch.equal(tensor, given[name]) for name, tensor in restored.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_pack_survives_toml(family: str) -> None:
    assert RuleSet.from_toml(rule_set(family).to_toml()) == rule_set(family)


def one_of_each_kind(plan: Plan) -> Plan:
    """The plan of one layer of each list: per rule and template the first source, and the sources of its targets."""
    first: dict[tuple[Rule, str], CopyTask] = {}
    for task in plan.tasks:
        first.setdefault((task.rule, split_numbers(task.source)[0]), task)
    targets = {task.target for task in first.values()}
    while True:  # a split source adds its other targets, a fused target its other sources
        sources = {task.source for task in plan.tasks if task.target in targets}
        more = {task.target for task in plan.tasks if task.source in sources}
        if more == targets:
            break
        targets = more
    source = Manifest({name: spec for name, spec in plan.source.items() if name in sources | set(plan.dropped)})
    return assert_covers(plan.rules, source, Manifest({name: plan.target[name] for name in targets}))


def target_mutations(plan: Plan) -> Iterator[tuple[str, Manifest]]:
    """Targets dropped, renamed, grown and added in turn."""
    target = dict(plan.target)
    for name, spec in target.items():
        yield f"drop {name}", Manifest({key: value for key, value in target.items() if key != name})
        yield f"rename {name}", Manifest({key + "_" * (key == name): value for key, value in target.items()})
        yield f"add {name}_", Manifest({**target, f"{name}_": spec})
        if spec.shape:
            grown = replace(spec, shape=(spec.shape[0] + 1, *spec.shape[1:]))
            yield f"grow {name}", Manifest({**target, name: grown})


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mutation_of_a_layer_is_accepted(family: str) -> None:
    plan = one_of_each_kind(plan_of(family))
    assert_mutations_caught(plan)
    for what, target in target_mutations(plan):
        assert not check(plan.rules, plan.source, target).ok, f"{family}: {what} of the target is accepted"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_single_mutation_is_accepted(family: str) -> None:
    assert_mutations_caught(plan_of(family))
