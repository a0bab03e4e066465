"""Every op: its effect on elements, complete accounting, and its inverse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from port_kit.errors import RemapError
from port_kit.remap import Op, Rule, RuleSet, load_weights, transform
from port_kit.remap.export import export
from port_kit.remap.invert import invert
from port_kit.testing.rules import assert_covers, assert_mutations_caught, assert_round_trip, values
from tests.helpers import raises
from tests.remap.shapes import manifest_of, module_of

X = torch.arange(24.0).reshape(4, 6)
SIZES = {"h": 2, "d": 3, "f": 4}


def load_one(rule: Rule, source: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    module = module_of({"y": shape})
    rules = RuleSet("one", (rule,), SIZES)
    assert load_weights(module, [("x", source)], rules) == {"y"}
    plan = assert_covers(rules, manifest_of({"x": source.shape}), manifest_of({"y": shape}))
    assert_round_trip(plan)
    assert torch.equal(dict(export(plan, module))["x"], source)
    back = module_of({"x": source.shape})
    load_weights(back, module.state_dict().items(), invert(plan))
    assert torch.equal(back.x, source)
    return module.y.data


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (Op.of("reshape", shape=("h", "h", -1)), X.reshape(2, 2, 6)),
        (Op.of("reshape", shape=("2*f", "d")), X.reshape(8, 3)),
        ("transpose", X.t()),
        (Op.of("transpose", perm=[1, 0]), X.t()),
        (Op.of("reorder", dim=0, runs=[["h", "2*h"], [0, "h"]]), torch.cat([X[2:], X[:2]])),
        (Op.of("reorder", dim=1, parts=3, order=[2, 0, 1]), torch.cat([X[:, 4:], X[:, :2], X[:, 2:4]], 1)),
        (Op.of("reorder", dim=-1), torch.cat([X[:, 3:], X[:, :3]], 1)),
        (
            Op.of("rearrange", pattern="(n two) c -> (two n) c", sizes=[["two", 2]]),
            X.reshape(2, 2, 6).transpose(0, 1).reshape(4, 6),
        ),
        (
            Op.of("rearrange", pattern="a (b c) -> c (b a)", sizes=[["b", "h"]]),
            X.reshape(4, 2, 3).permute(2, 1, 0).reshape(3, 8),
        ),
        (Op.of("rearrange", pattern="a ... -> ... a"), X.t()),
        (Op.of("rearrange", pattern="a b -> 1 a 1 b"), X[None, :, None]),
    ],
)
def test_one_to_one(op: Op | str, expected: torch.Tensor) -> None:
    assert torch.equal(load_one(Rule("x", "y", op=op), X, tuple(expected.shape)), expected)


@pytest.mark.parametrize(
    "op",
    [
        Op.of("reshape", shape=("2 +", -1)),
        Op.of("split", dim=0, sizes=("2 +", 2)),
        Op.of("reorder", dim=0, runs=[["2 +", 4]]),
        Op.of("rearrange", pattern="(a b) c -> (b a) c", sizes=[["a", "2 +"]]),
    ],
)
def test_a_size_that_cannot_be_read_is_refused_with_its_rule(op: Op) -> None:
    with raises("remap_size", "2 +"):
        Rule("x", "y", op=op)


def test_reshape_without_a_shape_takes_the_targets() -> None:
    assert torch.equal(load_one(Rule("x", "y", op="reshape"), X, (4, 6, 1, 1)), X[..., None, None])


def test_ops_run_in_order() -> None:
    rule = Rule("x", "y", op=["transpose", Op.of("reshape", shape=(3, 8)), Op.of("reorder", dim=1, parts=2)])
    expected = X.t().reshape(3, 8)
    assert torch.equal(load_one(rule, X, (3, 8)), torch.cat([expected[:, 4:], expected[:, :4]], 1))


def check_many(rules: RuleSet, source: dict[str, tuple[int, ...]], target: dict[str, tuple[int, ...]]) -> dict:
    """Load in two orders, compare, invert in two ways; return the loaded tensors and the sources."""
    plan = assert_covers(rules, manifest_of(source), manifest_of(target))
    assert_round_trip(plan)
    assert_mutations_caught(plan)
    tensors = values(plan.source)
    modules = [module_of(target), module_of(target)]
    assert load_weights(modules[0], tensors.items(), rules) == set(target)
    assert load_weights(modules[1], reversed(tensors.items()), rules) == set(target)
    for one, two in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(one, two)
    return {"loaded": modules[0].state_dict(), **tensors}


def test_split_into_unequal_parts_by_sizes_or_targets() -> None:
    targets = ("q", "k", "v")
    for sizes in (None, ("f", "h", "h")):
        op = Op.of("split", dim=0, **({"sizes": sizes} if sizes else {}))
        rules = RuleSet("gqa", (Rule("qkv", targets, op=op),), SIZES)
        got = check_many(rules, {"qkv": (8, 5)}, {"q": (4, 5), "k": (2, 5), "v": (2, 5)})
        assert torch.equal(torch.cat([got["loaded"][name] for name in targets]), got["qkv"])


def test_split_after_a_reshape_takes_interleaved_heads_apart() -> None:
    """The fused projection of HunyuanImage3: for each key head its query heads, then key, then value."""
    ops = (
        Op.of("rearrange", pattern="(g s d) c -> g s d c", sizes=[["s", "h+2"], ["d", "d"]]),
        Op.of("split", dim=1, sizes=("h", 1, 1)),
        Op.of("rearrange", pattern="g s d c -> (g s d) c"),
    )
    rules = RuleSet("interleaved", (Rule("qkv", ("q", "k", "v"), op=ops),), SIZES)
    source = manifest_of({"qkv": (24, 5)})
    target = manifest_of({"q": (12, 5), "k": (6, 5), "v": (6, 5)})
    plan = assert_covers(rules, source, target)
    assert_round_trip(plan)
    tensors = values(source)
    module = module_of({"q": (12, 5), "k": (6, 5), "v": (6, 5)})
    load_weights(module, tensors.items(), rules)
    grouped = tensors["qkv"].reshape(2, 4, 3, 5)
    assert torch.equal(module.q, grouped[:, :2].reshape(12, 5))
    assert torch.equal(module.k, grouped[:, 2].reshape(6, 5))
    assert torch.equal(module.v, grouped[:, 3].reshape(6, 5))


@pytest.mark.parametrize("sizes", [None, ("f", "h", "h")])
def test_concat_places_parts_of_any_order(sizes: tuple[str, ...] | None) -> None:
    op = Op.of("concat", dim=0, parts=("q", "k", "v"), **({"sizes": sizes} if sizes else {}))
    rules = RuleSet("fuse", (Rule(r"(q|k|v)\.w", "qkv.w", shard=r"\1", op=op),), SIZES)
    got = check_many(rules, {"v.w": (2, 5), "q.w": (4, 5), "k.w": (2, 5)}, {"qkv.w": (8, 5)})
    assert torch.equal(got["loaded"]["qkv.w"], torch.cat([got["q.w"], got["k.w"], got["v.w"]]))


def test_stack_and_into_fill_experts() -> None:
    rules = RuleSet(
        "experts",
        (
            Rule(r"experts\.(\d+)\.w1", "gate_up", into=r"[\1, 0:f]"),
            Rule(r"experts\.(\d+)\.w3", "gate_up", into=r"[\1, f:2*f]"),
            Rule(r"experts\.(\d+)\.w2", "down", shard=r"\1", op=Op.of("stack", dim=0)),
        ),
        SIZES,
    )
    source = {f"experts.{n}.{w}": (3, 4) if w == "w2" else (4, 3) for n in range(3) for w in ("w1", "w2", "w3")}
    got = check_many(rules, source, {"gate_up": (3, 8, 3), "down": (3, 3, 4)})
    assert torch.equal(got["loaded"]["gate_up"][2], torch.cat([got["experts.2.w1"], got["experts.2.w3"]]))
    assert torch.equal(got["loaded"]["down"][1], got["experts.1.w2"])


def test_take_lets_rules_share_a_source() -> None:
    rules = RuleSet(
        "linear1",
        (
            Rule(r"linear1", "qkv", take="[0:3*h]"),
            Rule(r"linear1", "mlp", take="[3*h:7*h, :]", op="transpose"),
            Rule(r"linear1", take="[7*h:]", drop="padding of the original"),
        ),
        {"h": 2},
    )
    plan = assert_covers(rules, manifest_of({"linear1": (16, 3)}), manifest_of({"qkv": (6, 3), "mlp": (3, 8)}))
    assert {task.target for task in plan.tasks} == {"qkv", "mlp"}
    with raises("remap_unused", "linear1"):
        dict(export(plan, values(plan.target)))


def test_index_arithmetic_in_targets() -> None:
    rules = RuleSet("blocks", (Rule(r"up\.(\d+)\.w", r"up_blocks.{n - 1 - \1}.res.{\1 % 2}.w"),), {"n": 3})
    got = check_many(
        rules,
        {f"up.{n}.w": (2,) for n in range(3)},
        {"up_blocks.2.res.0.w": (2,), "up_blocks.1.res.1.w": (2,), "up_blocks.0.res.0.w": (2,)},
    )
    assert torch.equal(got["loaded"]["up_blocks.2.res.0.w"], got["up.0.w"])


WEIGHT_NORM = RuleSet(
    "vocoder",
    (
        Rule(r"conv\.(\d+)\.weight_(g|v)", r"conv.\1.weight", shard=r"\2", op="weight_norm", variant="wn:old"),
        *(
            Rule(
                rf"conv\.(\d+)\.parametrizations\.weight\.original{number}",
                r"conv.\1.weight",
                shard=shard,
                op="weight_norm",
                variant="wn:new",
            )
            for number, shard in enumerate("gv")
        ),
    ),
)


@pytest.mark.parametrize("names", [("weight_g", "weight_v"), ("parametrizations.weight.original0",) * 2])
def test_weight_norm_folds_in_either_spelling(names: tuple[str, str]) -> None:
    names = (names[0], names[1].replace("original0", "original1"))
    plain = torch.nn.Conv1d(3, 4, 5)
    normed = torch.nn.utils.weight_norm(torch.nn.Conv1d(3, 4, 5))
    tensors = {f"conv.7.{names[0]}": normed.weight_g, f"conv.7.{names[1]}": normed.weight_v}
    module = module_of({"conv.7.weight": (4, 3, 5)})
    assert load_weights(module, tensors.items(), WEIGHT_NORM) == {"conv.7.weight"}
    x = torch.randn(1, 3, 9)
    expected = torch.nn.functional.conv1d(x, normed.weight)
    assert torch.equal(torch.nn.functional.conv1d(x, module.get_parameter("conv.7.weight")), expected)
    assert plain.weight.shape == (4, 3, 5)


def test_weight_norm_in_two_spellings_or_none_is_an_error() -> None:
    shapes = {"conv.0.weight_g": (4, 1, 1), "conv.0.weight_v": (4, 3, 5)}
    new = {
        "conv.1.parametrizations.weight.original0": (4, 1, 1),
        "conv.1.parametrizations.weight.original1": (4, 3, 5),
    }
    target = manifest_of({"conv.0.weight": (4, 3, 5), "conv.1.weight": (4, 3, 5)})
    with pytest.raises(RemapError) as caught:
        WEIGHT_NORM.compile(manifest_of({**shapes, **new}), target)
    assert caught.value.code == "remap_ambiguous"
    with raises("remap_dead_rule", "wn"):
        WEIGHT_NORM.compile(manifest_of({}), manifest_of({}))


def test_named_transform_declares_shape_and_inverse() -> None:
    @transform("plus_one", shape=lambda parts, args: parts[""], inverse=lambda t, args, shapes: {"": t - 1}, exact=True)
    def plus_one(parts: Any, args: Any) -> torch.Tensor:
        return parts[""] + 1

    rules = RuleSet("norms", (Rule(r"(\w+)\.gamma", r"\1.weight", op="plus_one"),))
    plan = assert_covers(rules, manifest_of({"n.gamma": (4,)}), manifest_of({"n.weight": (4,)}))
    assert_round_trip(plan)
    module = module_of({"n.weight": (4,)})
    load_weights(module, [("n.gamma", torch.zeros(4))], rules)
    assert module.n.weight.tolist() == [1, 1, 1, 1]


def test_cast_allows_a_loss_and_nothing_else_does() -> None:
    source, target = manifest_of({"x": (2,)}), manifest_of({"x": (2,)}, "bfloat16")
    with pytest.raises(RemapError) as caught:
        RuleSet("r", (Rule("x", "x"),)).compile(source, target)
    assert caught.value.code == "remap_dtype"
    assert_covers(RuleSet("r", (Rule("x", "x", op=Op.of("cast", dtype="bfloat16")),)), source, target)
    assert_covers(RuleSet("r", (Rule("x", "x"),), allow_downcast=True), source, target)
    with pytest.raises(RemapError) as caught:
        RuleSet("r", (Rule("x", "x"),), allow_downcast=True).compile(source, manifest_of({"x": (2,)}, "int64"))
    assert caught.value.code == "remap_dtype"


@pytest.mark.parametrize("order", ["abcd", "cabd", "dcba"])
def test_a_part_of_the_mean_width_waits_for_the_others(order: str) -> None:
    """Parts of 1, 1, 2 and 4 rows: the third has a quarter of the rows, at another offset than equal parts."""
    sizes = {"a": 1, "b": 1, "c": 2, "d": 4}
    rules = RuleSet("r", (Rule("([abcd])", "w", shard=r"\1", op=Op.of("concat", dim=0, parts=tuple("abcd"))),))
    tensors = {name: torch.rand(rows, 3) for name, rows in sizes.items()}
    module = module_of({"w": (8, 3)})
    assert load_weights(module, [(name, tensors[name]) for name in order], rules) == {"w"}
    assert torch.equal(module.w, torch.cat([tensors[name] for name in "abcd"]))
