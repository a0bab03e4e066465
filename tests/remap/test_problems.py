"""Every gap is an error of its own code that names rule, source, file, target and the nearest name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from port_kit.errors import RemapError
from port_kit.manifest import Manifest, TensorSpec
from port_kit.remap import Op, Rule, RuleSet, load_weights
from port_kit.remap.plan import check
from tests.helpers import raises
from tests.remap.shapes import manifest_of, module_of

RULES = RuleSet(
    "small",
    (
        Rule(r"blocks\.(\d+)\.attn\.(q|k|v)\.weight", r"layers.\1.attn.to_\2.weight"),
        Rule(r"head\.weight", "out.weight"),
    ),
)
SOURCE = {f"blocks.{n}.attn.{p}.weight": (4, 4) for n in range(2) for p in "qkv"} | {"head.weight": (3, 4)}
TARGET = {f"layers.{n}.attn.to_{p}.weight": (4, 4) for n in range(2) for p in "qkv"} | {"out.weight": (3, 4)}


def problems_of(source: dict, target: dict, rules: RuleSet = RULES, dtype: str = "float32") -> dict[str, str]:
    source_manifest = Manifest({n: TensorSpec(tuple(s), dtype, file="part-1.safetensors") for n, s in source.items()})
    return {problem.code: str(problem) for problem in check(rules, source_manifest, manifest_of(target)).explained()}


def test_a_complete_plan_has_no_problems() -> None:
    assert problems_of(SOURCE, TARGET) == {}


def test_unexpected_names_file_and_nearest() -> None:
    found = problems_of(SOURCE | {"blocks.0.attn.q.bias": (4,)}, TARGET)
    assert list(found) == ["remap_unexpected"]
    assert "blocks.0.attn.q.bias matches no rule (in part-1.safetensors)" in found["remap_unexpected"]
    wrong = RULES.extend([Rule(r"tail\.weight", "outt.weight")])
    found = problems_of(SOURCE | {"tail.weight": (3, 4)}, TARGET, wrong)
    assert "did you mean out.weight?" in found["remap_unexpected"]


def test_missing_names_nearest_source() -> None:
    source = {name: shape for name, shape in SOURCE.items() if name != "blocks.1.attn.k.weight"}
    found = problems_of(source, TARGET)
    assert list(found) == ["remap_missing"]
    assert "layers.1.attn.to_k.weight [4, 4] is not written" in found["remap_missing"]


def test_shape_names_both_shapes_and_the_rule() -> None:
    found = problems_of(SOURCE | {"head.weight": (4, 4)}, TARGET)
    assert list(found) == ["remap_shape"]
    assert "[4, 4]" in found["remap_shape"] and "[3, 4]" in found["remap_shape"]
    assert r"head\.weight" in found["remap_shape"] and "part-1.safetensors" in found["remap_shape"]


@pytest.mark.parametrize("shape", [(1, 4), (4,), (1,), (), (3, 1), (1, 3, 4)])
def test_nothing_broadcasts(shape: tuple[int, ...]) -> None:
    assert list(problems_of(SOURCE | {"head.weight": shape}, TARGET)) == ["remap_shape"]


def test_layers_beyond_the_module() -> None:
    found = problems_of(SOURCE | {"blocks.2.attn.q.weight": (4, 4)}, TARGET)
    assert list(found) == ["remap_beyond_layers"]


def test_collision_and_overlap() -> None:
    two = RULES.extend([Rule(r"extra\.weight", "out.weight")])
    found = problems_of(SOURCE | {"extra.weight": (3, 4)}, TARGET, two)
    assert list(found) == ["remap_collision"]
    assert "head.weight and extra.weight are both written to out.weight" in found["remap_collision"]
    parts = RuleSet("parts", (Rule("a", "y", into="[0:3]"), Rule("b", "y", into="[2:4]")))
    assert list(problems_of({"a": (3,), "b": (2,)}, {"y": (4,)}, parts)) == ["remap_overlap"]
    twice = RuleSet("twice", (Rule("a", "x", take="[0:3]"), Rule("a", "y", take="[2:4]")))
    assert list(problems_of({"a": (4,)}, {"x": (3,), "y": (2,)}, twice)) == ["remap_overlap"]


def test_ambiguous_dead_and_unused() -> None:
    found = problems_of(SOURCE, TARGET, RULES.extend([Rule(r"head\.(\w+)", r"out.\1")]))
    assert "remap_ambiguous" in found and r"head\.weight and head\.(\w+)" in found["remap_ambiguous"]
    assert list(problems_of(SOURCE, TARGET, RULES.extend([Rule("gone", "out")]))) == ["remap_dead_rule"]
    assert problems_of(SOURCE, TARGET, RULES.extend([Rule("gone", "out", optional=True)])) == {}
    assert list(problems_of(SOURCE, TARGET, RULES.extend([Rule(target="gone", keep="x")]))) == ["remap_dead_rule"]
    part = RuleSet("part", (Rule("a", "x", take="[0:3]"),))
    assert list(problems_of({"a": (4,)}, {"x": (3,)}, part)) == ["remap_unused"]


def test_incomplete_groups_name_what_they_lack() -> None:
    slots = {"q": ((0, 2), (0, 3)), "k": ((2, 3), (0, 3)), "v": ((3, 4), (0, 3))}
    target = Manifest({"qkv": TensorSpec((4, 3), "float32", slots=slots)})
    rules = RuleSet("slots", (Rule(r"(q|k|v)", "qkv", shard=r"\1"),))
    plan = check(rules, manifest_of({"q": (2, 3), "v": (1, 3)}), target)
    assert [problem.code for problem in plan.problems] == ["remap_incomplete_group"]
    assert plan.problems[0].missing == ("k",)
    concat = RuleSet("c", (Rule(r"(q|k)", "y", shard=r"\1", op=Op.of("concat", dim=0, parts=["q", "k"])),))
    assert "missing: k" in problems_of({"q": (2,)}, {"y": (4,)}, concat)["remap_incomplete_group"]
    wrong = RuleSet("slots", (Rule(r"(q|k|v|o)", "qkv", shard=r"\1"),))
    assert {p.code for p in check(wrong, manifest_of({"o": (2, 3)}), target).problems} >= {"remap_slot"}


def test_one_error_tells_all_kinds() -> None:
    source = SOURCE | {"head.weight": (4, 4), "more": (1,)}
    with pytest.raises(RemapError) as caught:
        RULES.compile(manifest_of(source), manifest_of(TARGET))
    assert caught.value.code == "remap_failed"
    assert {problem["code"] for problem in caught.value.details["problems"]} == {"remap_shape", "remap_unexpected"}
    assert "shape:" in caught.value.message and "unexpected:" in caught.value.message


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: Rule("(a+)+b", "x"), "remap_pattern"),
        (lambda: Rule("(a|aa)*", "x"), "remap_pattern"),
        (lambda: Rule(r"(\w)\1", "x"), "remap_pattern"),
        (lambda: Rule("(?i)a", "x"), "remap_pattern"),
        (lambda: Rule("(", "x"), "remap_pattern"),
        (lambda: Rule(".*.*.*.*x", "x"), "remap_pattern"),
        (lambda: Rule("a" * 700, "x"), "remap_pattern"),
        (lambda: Rule("(a)", r"\2"), "remap_template"),
        (lambda: Rule("(a)", r"\g<n>"), "remap_template"),
        (lambda: Rule("(a)", "x{"), "remap_template"),
        (lambda: Rule("a", "{__import__('os')}"), "remap_size"),
        (lambda: Rule("a", "x", take="[2**9]"), "remap_size"),
        (lambda: Rule("a", "x", take="0:2"), "remap_op"),
        (lambda: Rule("a", "x", op="nothing"), "remap_op"),
        (lambda: Rule("a", "x", op="split"), "remap_op"),
        (lambda: Rule("a", ("x", "y")), "remap_op"),
        (lambda: Rule("a", "x", op=Op.of("cast", dtype="int3")), "remap_op"),
        (lambda: Rule("a", "x", op=Op.of("concat", dim=0, parts=["q"])), "remap_op"),
        (lambda: Rule("a", "x", op=Op.of("rearrange", pattern="a b -> a")), "remap_op"),
        (lambda: Rule("a"), "remap_rules"),
        (lambda: Rule("a", "x", drop="why"), "remap_rules"),
        (lambda: RuleSet("r", (Rule("a", "x"), Rule("a", "x"))), "remap_rules"),
        (lambda: RULES.override([Rule("a", "x")]), "remap_rules"),
        (lambda: RuleSet("r", sizes={"a": "b", "b": "a"}).compile(Manifest({}), Manifest({})), "remap_size"),
        (lambda: RuleSet("r", sizes={"a": "no"}).compile(Manifest({}), Manifest({})), "remap_size"),
    ],
)
def test_rules_that_cannot_work_are_refused(make: Callable, code: str) -> None:
    with pytest.raises(RemapError) as caught:
        make()
    assert caught.value.code == code
    assert caught.value.hint


def test_unknown_size_is_reported_with_the_known_ones() -> None:
    rules = RuleSet("r", (Rule("a", "x", take="[0:hiden]"),), {"hidden": 2})
    plan = check(rules, manifest_of({"a": (2,)}), manifest_of({"x": (2,)}))
    assert plan.problems[0].code == "remap_size" and "hiden" in plan.problems[0].message


def test_accepted_patterns_end_on_long_names_that_they_do_not_match() -> None:
    rules = RuleSet("slow", (Rule(r".*a.*b.*c", "x"), Rule(r"([^.]+)\.([^.]+)\.(\w+)d", r"\1")))
    source = manifest_of({f"{letter * 244}.{letter * 11}": (1,) for letter in "abcd"})
    plan = check(rules, source, manifest_of({"x": (1,)}))
    assert {problem.code for problem in plan.problems} == {"remap_dead_rule", "remap_missing", "remap_unexpected"}


# -- loading -------------------------------------------------------------------------------------------------------


def load(tensors: dict[str, torch.Tensor], target: dict = TARGET, rules: RuleSet = RULES, **options: Any) -> set[str]:
    return load_weights(module_of(target), tensors.items(), rules, **options)


def zeros(shapes: dict) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t: t.pop("head.weight"), "remap_failed"),  # a missing target and a rule without a match
        (lambda t: t.pop("blocks.0.attn.v.weight"), "remap_missing"),
        (lambda t: t.update({"more": torch.zeros(2)}), "remap_unexpected"),
        (lambda t: t.update({"head.weight": torch.zeros(1)}), "remap_shape"),
        (lambda t: t.update({"head.weight": torch.zeros(3, 4, dtype=torch.int32)}), "remap_dtype"),
        (lambda t: t.update({"blocks.7.attn.q.weight": torch.zeros(4, 4)}), "remap_beyond_layers"),
        (lambda t: t.update({"out.weight": torch.zeros(3, 4)}), "remap_unexpected"),
    ],
)
def test_loading_is_strict(change: Callable, code: str) -> None:
    tensors = zeros(SOURCE)
    change(tensors)
    with pytest.raises(RemapError) as caught:
        load(tensors)
    assert caught.value.code == code


def test_a_tensor_that_comes_twice_is_an_error() -> None:
    stream = [*zeros(SOURCE).items(), ("head.weight", torch.ones(3, 4))]
    with raises("remap_collision", "head.weight"):
        load_weights(module_of(TARGET), stream, RULES)


def test_errors_of_a_load_name_the_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(zeros(SOURCE | {"head.weight": (4, 4)}), tmp_path / "model-1.safetensors")
    with pytest.raises(RemapError) as caught:
        load({}, folder=tmp_path)
    assert "model-1.safetensors" in caught.value.message and caught.value.code == "remap_shape"
    (tmp_path / "model-1.safetensors").unlink()
    save_file(zeros(SOURCE), tmp_path / "model-1.safetensors")
    with raises("remap_missing", "model-1.safetensors"):
        load({}, folder=tmp_path)
    assert load(zeros(SOURCE), folder=tmp_path, prefix="dit.") == {f"dit.{name}" for name in TARGET}
