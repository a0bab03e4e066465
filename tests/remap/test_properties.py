"""Random checkpoints and rules: load, export and reload is the identity; only RemapError is ever raised."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from port_kit.errors import RemapError
from port_kit.manifest import Manifest, TensorSpec
from port_kit.regions import (
    first_overlap,
    full_region,
    intersection,
    region_numel,
    reshaped,
    to_intervals,
    to_regions,
)
from port_kit.remap import Op, Rule, RuleSet, load_weights
from port_kit.remap.export import convert, export, inexact
from port_kit.remap.invert import invert
from port_kit.remap.plan import check
from port_kit.testing.rules import values
from tests.remap.random_mappings import KINDS, RandomMapping, folded, random_mappings
from tests.remap.shapes import manifest_of, module_of

EXAMPLES = int(os.environ.get("PORT_KIT_EXAMPLES", "100"))
SETTINGS = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
extent = st.integers(1, 5)


@SETTINGS
@given(random_mappings(), st.randoms(use_true_random=False))
def test_load_export_reload_is_the_identity(made: tuple[RandomMapping, RuleSet], rng: Any) -> None:
    mapping, rules = made
    plan = rules.compile(manifest_of(mapping.source), manifest_of(mapping.target))
    given_ = values(plan.source)
    tensors = list(given_.items())
    rng.shuffle(tensors)
    module = module_of(mapping.target)
    assert load_weights(module, tensors, rules) == set(mapping.target)
    written = {name: tensor.data for name, tensor in module.named_parameters() if name not in mapping.kept}
    assert not any(torch.isnan(tensor).any() for tensor in written.values())
    converted = dict(convert(plan, given_))
    assert converted.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in converted.items())
    back = dict(export(plan, module))
    assert set(back) == set(mapping.source) - mapping.dropped and set(inexact(plan)) == mapping.folded
    assert all(torch.equal(tensor, given_[name]) for name, tensor in back.items() if name not in mapping.folded)
    again = module_of(mapping.target)
    dropped = {name: given_[name] for name in mapping.dropped}
    load_weights(again, {**back, **dropped}.items(), RuleSet.from_toml(rules.to_toml()))
    for name, tensor in written.items():
        same = torch.allclose if mapping.folded else torch.equal
        assert same(tensor, again.get_parameter(name)), name


@SETTINGS
@given(random_mappings(tuple(kind for kind in KINDS if kind is not folded)))
def test_inverse_rules_are_the_way_back(made: tuple[RandomMapping, RuleSet]) -> None:
    mapping, rules = made
    plan = rules.compile(manifest_of(mapping.source), manifest_of(mapping.target))
    given_ = values(plan.source)
    inverse = RuleSet.from_toml(invert(plan).to_toml())
    back = inverse.compile(plan.target, plan.source)
    kept = {name: torch.zeros(mapping.target[name]) for name in mapping.kept}
    restored = dict(convert(back, {**dict(convert(plan, given_)), **kept}))
    assert set(restored) == set(mapping.source) - mapping.dropped
    assert all(torch.equal(tensor, given_[name]) for name, tensor in restored.items())


@SETTINGS
@given(random_mappings(), st.data())
def test_no_incomplete_plan_is_accepted(made: tuple[RandomMapping, RuleSet], data: st.DataObject) -> None:
    mapping, rules = made
    source, target = mapping.source, mapping.target
    victim = data.draw(st.sampled_from(sorted(set(source) - mapping.dropped)))
    without = {name: shape for name, shape in source.items() if name != victim}
    assert not check(rules, manifest_of(without), manifest_of(target)).ok
    wanted = data.draw(st.sampled_from(sorted(target)))
    assert not check(rules, manifest_of(source), manifest_of(target | {f"{wanted}.more": (1,)})).ok
    grown = (source[victim][0] + 1, *source[victim][1:])
    assert not check(rules, manifest_of(source | {victim: grown}), manifest_of(target)).ok


text = st.text(st.sampled_from(r"ab01.\()[]{}|+*?^$d:<>g-"), max_size=14)


@SETTINGS
@given(text, text, text, text, st.sampled_from(["", "transpose", "split", "stack", "copy"]), st.booleans())
def test_no_rule_brings_a_foreign_exception(
    source: str, target: str, shard: str, box: str, op: str, optional: bool
) -> None:
    manifest = Manifest({"a.0.b": TensorSpec((2, 3), "float32"), "b": TensorSpec((), "int8")})
    try:
        ops = (Op.of(op, dim=0),) if op in ("split", "stack") else op
        rule = Rule(source, target, shard=shard, take=box, op=ops, optional=optional)
        plan = check(RuleSet("r", (rule,)), manifest, manifest)
        RuleSet.from_toml(RuleSet("r", (rule,)).to_toml())
    except RemapError:
        return
    if plan.ok:
        assert {task.target for task in plan.tasks} == set(manifest)


@SETTINGS
@given(st.lists(extent, min_size=1, max_size=4), st.data())
def test_regions_survive_reshapes(shape: list, data: st.DataObject) -> None:
    box = tuple(tuple(sorted(data.draw(st.sets(st.integers(0, n), min_size=2, max_size=2)))) for n in shape)
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    taken = set(numbers[tuple(slice(a, b) for a, b in box)].flatten().tolist())
    assert {n for a, b in to_intervals(box, tuple(shape)) for n in range(a, b)} == taken
    flat = (numbers.numel(),)
    boxes = reshaped(reshaped([box], tuple(shape), flat), flat, tuple(reversed(shape)))
    other = numbers.reshape(tuple(reversed(shape)))
    assert {n for b in boxes for n in other[tuple(slice(*pair) for pair in b)].flatten().tolist()} == taken
    assert sum(map(region_numel, boxes)) == len(taken) and first_overlap(boxes) is None
    assert to_regions([(0, numbers.numel())], tuple(shape)) == [full_region(tuple(shape))]
    assert intersection(box, full_region(tuple(shape))) == box


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 2)), min_size=2, max_size=6))
def test_overlaps_are_found(corners: list) -> None:
    boxes = [((x, x + size), (y, y + size)) for x, y, size in corners]
    slow = any(intersection(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert (first_overlap(boxes) is not None) == slow


def test_rules_read_and_write_each_other() -> None:
    rules = RuleSet(
        "all",
        (
            Rule(r"a'\"\\n", "x", op=Op.of("reorder", dim=0, runs=[["h", "2*h"], [0, "h"]]), variant="c:d"),
            Rule("b\t", ("x", "y"), shard=("q", "k"), op=[Op.of("split", dim=0), "transpose"], take="[0:h]"),
            Rule("c", drop="because\nof that", optional=True),
            Rule(target=r"rope\..*", keep="computed"),
            Rule("(.*)", r"\1", fallback=True),
        ),
        {"h": 2, "g": "2*h"},
        allow_downcast=True,
    )
    assert RuleSet.from_toml(rules.to_toml()) == rules
    moved = rules.under("model.", "dit.")
    assert all(rule.source.startswith(re.escape("model.")) for rule in moved if rule.source)


def test_files_build_on_files(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("name = 'base'\n[sizes]\nh = 2\n[[rule]]\nsource = 'a'\ntarget = 'x'\n")
    (tmp_path / "top.toml").write_text(
        "name = 'top'\nextends = 'base.toml'\n[[rule]]\nsource = 'a'\ntarget = 'y'\n"
        "[[rule]]\nsource = 'b'\ntarget = 'z'\n"
        "[[include]]\nrules = 'base.toml'\nsource = 'vae.'\ntarget = 'v.'\n"
    )
    rules = RuleSet.from_file(tmp_path / "top.toml")
    assert [(rule.source, rule.target) for rule in rules] == [("a", "y"), ("b", "z"), (r"vae\.a", "v.x")]
    assert rules.sizes == {"h": 2}
