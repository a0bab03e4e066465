"""Values of a load: a finite one never becomes infinite, and weight norm is folded in float32."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from port_kit.errors import RemapError
from port_kit.manifest import Manifest
from port_kit.remap import Op, Rule, RuleSet, load_weights
from port_kit.remap.export import convert, export
from tests.remap.shapes import manifest_of


@pytest.mark.parametrize(
    ("source", "target", "value"),
    [
        (torch.float32, torch.float16, 1e6),
        (torch.bfloat16, torch.float16, 7e4),
        (torch.float64, torch.float32, 1e300),
        (torch.float32, torch.bfloat16, 3.4e38),
        (torch.float32, torch.float8_e5m2, 1e6),
        (torch.bfloat16, torch.float8_e4m3fn, 1e3),
    ],
)
def test_a_finite_value_never_becomes_infinite(source: torch.dtype, target: torch.dtype, value: float) -> None:
    rules, module = RuleSet("r", (Rule("w", "weight"),)), nn.Linear(2, 1, bias=False).to(target).requires_grad_(False)
    load_weights(module, [("w", torch.tensor([[float("inf"), 1.0]], dtype=torch.float64).to(source))], rules)
    load_weights(module, [("w", torch.tensor([[2.0, 1.0]], dtype=torch.float64).to(source))], rules)
    assert module.weight.float().tolist() == [[2.0, 1.0]]
    with pytest.raises(RemapError) as caught:
        load_weights(module, [("w", torch.tensor([[value, 1.0]], dtype=torch.float64).to(source))], rules)
    [problem] = caught.value.details["problems"]
    assert (problem["code"], problem["source"], problem["target"]) == ("remap_overflow", "w", "weight")


def test_casts_on_the_way_and_back_do_not_overflow_either() -> None:
    rules = RuleSet("r", (Rule("w", "weight", op=Op.of("cast", dtype="float16")),))
    with pytest.raises(RemapError) as caught:
        load_weights(nn.Linear(2, 1, bias=False), [("w", torch.tensor([[1e6, 1.0]]))], rules)
    assert caught.value.code == "remap_overflow"
    source, target = Manifest({"a": ((2,), "float16")}), manifest_of({"b": (2,)})
    plan = RuleSet("r", (Rule("a", "b"),)).compile(source, target)
    with pytest.raises(RemapError) as caught:
        dict(export(plan, {"b": torch.tensor([1e6, 1.0])}))
    assert caught.value.code == "remap_overflow"
    plan = RuleSet("r", (Rule("b", "a"),)).compile(target, source, allow_downcast=True)
    with pytest.raises(RemapError) as caught:
        dict(convert(plan, {"b": torch.tensor([1e6, 1.0])}))
    assert caught.value.code == "remap_overflow"


@pytest.mark.parametrize(
    ("target", "value", "fits"),
    [
        ("float16", 65519.0, True),
        ("float16", 65520.0, False),
        ("float8_e4m3fn", 463.0, True),
        ("float8_e4m3fn", 470.0, False),
        ("float8_e5m2", 61000.0, True),
        ("float8_e5m2", 63000.0, False),
        ("float8_e4m3fnuz", 247.0, True),
        ("float8_e4m3fnuz", 252.0, False),
    ],
)
def test_values_overflow_from_half_a_step_beyond_the_largest(target: str, value: float, fits: bool) -> None:
    rules = RuleSet("r", (Rule("w", "weight"),))
    module = nn.Linear(2, 1, bias=False).to(getattr(torch, target)).requires_grad_(False)
    with nullcontext() if fits else pytest.raises(RemapError) as caught:
        load_weights(module, [("w", torch.tensor([[value, 1.0]]))], rules)
    assert fits or caught.value.code == "remap_overflow"


@pytest.mark.parametrize("other", [float("inf"), float("nan")])
def test_values_that_are_not_finite_hide_no_overflow(other: float) -> None:
    source, target = Manifest({"a": ((2,), "float16")}), manifest_of({"b": (2,)})
    given, rules = torch.tensor([other, 1e6]), RuleSet("r", (Rule("b", "a"),))
    with pytest.raises(RemapError) as caught:
        dict(convert(rules.compile(target, source, allow_downcast=True), {"b": given}))
    assert caught.value.code == "remap_overflow"
    with pytest.raises(RemapError) as caught:
        dict(export(RuleSet("r", (Rule("a", "b"),)).compile(source, target), {"b": given}))
    assert caught.value.code == "remap_overflow"


@pytest.mark.parametrize("large", [1e6, float("inf")])
def test_each_part_of_a_source_overflows_by_itself(large: float) -> None:
    rules = RuleSet("r", (Rule("a", ("x", "y"), op=Op.of("split", dim=0)),))
    source = Manifest({"a": ((4,), "float32")})
    target = Manifest({"x": ((2,), "float8_e4m3fn"), "y": ((2,), "float32")})
    plan = rules.compile(source, target, allow_downcast=True)
    assert dict(convert(plan, {"a": torch.tensor([1, 2, large, 3])}))["x"].tolist() == [1, 2]
    with pytest.raises(RemapError) as caught:
        dict(convert(plan, {"a": torch.tensor([1, 1e4, large, 3])}))
    assert caught.value.code == "remap_overflow"


def test_an_infinite_part_does_not_make_the_others_overflow() -> None:
    rules = RuleSet("r", (Rule("a", ("x", "y"), op=Op.of("split", dim=0)),))
    plan = rules.compile(Manifest({"a": ((4,), "float16")}), manifest_of({"x": (2,), "y": (2,)}))
    parts = {"x": torch.tensor([float("inf"), 1]), "y": torch.tensor([2.0, 3.0])}
    assert dict(export(plan, parts))["a"].tolist() == [float("inf"), 1, 2, 3]


@pytest.mark.parametrize(
    ("given", "dtype"), [(torch.tensor([70000]), "float16"), (torch.tensor([1e4]), "float8_e4m3fn")]
)
def test_casts_that_a_rule_asks_for_overflow_too(given: Tensor, dtype: str) -> None:
    rules = RuleSet("r", (Rule("a", "b", op=Op.of("cast", dtype=dtype)),))
    source = Manifest({"a": (given.shape, str(given.dtype).removeprefix("torch."))})
    plan = rules.compile(source, manifest_of({"b": (1,)}))
    with pytest.raises(RemapError) as caught:
        dict(convert(plan, {"a": given}))
    assert caught.value.code == "remap_overflow"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_norm_is_folded_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    v, g = torch.randn(4, 8, 3).to(dtype), (3 * torch.rand(4, 1, 1)).to(dtype)
    module = nn.Conv1d(8, 4, 3, bias=False)
    rules = RuleSet("r", (Rule(r"a\.weight_([gv])", "weight", shard=r"\1", op="weight_norm"),))
    load_weights(module, [("a.weight_g", g), ("a.weight_v", v)], rules)
    assert torch.equal(module.weight.data, torch._weight_norm(v.float(), g.float(), 0))
