"""Random checkpoints and rules: load, export and reload is the identity; only RemapError is ever raised."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from port_kit.errors import RemapError
from port_kit.manifest import Manifest, TensorSpec
from port_kit.remap import Op, Rule, RuleSet, load_weights
from port_kit.remap.boxes import first_overlap, intersection, reshaped, to_boxes, to_intervals, volume, whole
from port_kit.remap.export import export
from port_kit.remap.plan import check
from port_kit.remap.testing import values
from tests.remap.shapes import manifest_of, module_of

SETTINGS = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
extent = st.integers(1, 5)


@st.composite
def pairs(draw: st.DrawFn, number: int) -> tuple[list[Rule], dict[str, tuple], dict[str, tuple]]:
    """Rules for a few tensors of one kind, with the shapes of both sides."""
    a, b, c = draw(extent), draw(extent), draw(extent)
    layers = draw(st.integers(1, 3))
    name, to = rf"s{number}\.(\d+)\.w", rf"t{number}.\1.w"
    kind = draw(st.sampled_from(["copy", "transpose", "rearrange", "split", "concat", "stack", "take", "reorder"]))
    if kind == "split":
        rules = [Rule(name, (rf"t{number}.\1.a", rf"t{number}.\1.b"), op=Op.of("split", dim=0, sizes=(a, b)))]
        one, many = {"w": (a + b, c)}, {"a": (a, c), "b": (b, c)}
    elif kind == "concat":
        op = Op.of("concat", dim=1, parts=("a", "b"))
        rules = [Rule(rf"s{number}\.(\d+)\.(a|b)", to, shard=r"\2", op=op)]
        one, many = {"a": (c, a), "b": (c, b)}, {"w": (c, a + b)}
    elif kind == "take":
        rules = [Rule(name, rf"t{number}.\1.a", take=f"[0:{a}]"), Rule(name, rf"t{number}.\1.b", take=f"[{a}:]")]
        one, many = {"w": (a + b, c)}, {"a": (a, c), "b": (b, c)}
    elif kind == "stack":
        rules = [Rule(name, f"t{number}.all", shard=r"\1", op=Op.of("stack", dim=0))]
        return rules, {f"s{number}.{n}.w": (a, b) for n in range(layers)}, {f"t{number}.all": (layers, a, b)}
    else:
        ops = {
            "copy": (),
            "transpose": "transpose",
            "rearrange": Op.of("rearrange", pattern="(x y) z -> z (y x)", sizes=[["x", a]]),
            "reorder": Op.of("reorder", dim=0, runs=[[a, a + b], [0, a]]),
        }
        shapes = {
            "copy": ((a, b), (a, b)),
            "transpose": ((a, b), (b, a)),
            "rearrange": ((a * b, c), (c, b * a)),
            "reorder": ((a + b, c), (a + b, c)),
        }
        rules = [Rule(name, to, op=ops[kind])]
        one, many = {"w": shapes[kind][0]}, {"w": shapes[kind][1]}
    return (
        rules,
        {f"s{number}.{n}.{leaf}": shape for n in range(layers) for leaf, shape in one.items()},
        {f"t{number}.{n}.{leaf}": shape for n in range(layers) for leaf, shape in many.items()},
    )


@st.composite
def worlds(draw: st.DrawFn) -> tuple[RuleSet, dict[str, tuple], dict[str, tuple]]:
    rules, source, target = [], {}, {}
    for number in range(draw(st.integers(1, 4))):
        more = draw(pairs(number))
        rules += more[0]
        source |= more[1]
        target |= more[2]
    return RuleSet("random", tuple(rules)), source, target


@SETTINGS
@given(worlds(), st.randoms(use_true_random=False))
def test_load_export_reload_is_the_identity(world: tuple, rng: Any) -> None:
    rules, source, target = world
    plan = rules.compile(manifest_of(source), manifest_of(target))
    tensors = list(values(plan.source).items())
    rng.shuffle(tensors)
    module = module_of(target)
    assert load_weights(module, tensors, rules) == set(target)
    assert not any(torch.isnan(parameter).any() for parameter in module.parameters())
    back = dict(export(plan, module))
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors) and len(back) == len(tensors)
    again = module_of(target)
    load_weights(again, back.items(), RuleSet.from_toml(rules.to_toml()))
    assert all(torch.equal(one, two) for one, two in zip(module.parameters(), again.parameters(), strict=True))


@SETTINGS
@given(worlds(), st.data())
def test_no_incomplete_plan_is_accepted(world: tuple, data: st.DataObject) -> None:
    rules, source, target = world
    victim = data.draw(st.sampled_from(sorted(source)))
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
        assert {write.target for write in plan.writes} == set(manifest)


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
    assert sum(map(volume, boxes)) == len(taken) and first_overlap(boxes) is None
    assert to_boxes([(0, numbers.numel())], tuple(shape)) == [whole(tuple(shape))]
    assert intersection(box, whole(tuple(shape))) == box


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
        narrow=True,
    )
    assert RuleSet.from_toml(rules.to_toml()) == rules
    made: dict[str, RuleSet] = {}
    exec(rules.to_python(), made)
    assert made["RULES"] == rules
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
