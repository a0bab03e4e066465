"""Loading from streams: ownership of buffers, layers that differ, and several targets of one source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from port_kit.errors import RemapError
from port_kit.manifest import Manifest, TensorSpec
from port_kit.remap import Op, Rule, RuleSet, load_local, load_weights
from port_kit.remap.export import convert, export
from port_kit.remap.invert import invert
from port_kit.remap.load import WeightLoader
from port_kit.remap.plan import check
from tests.helpers import raises
from tests.remap.random_mappings import Shapes
from tests.remap.shapes import manifest_of, module_of, zeros

JOIN = Op.of("concat", dim=0, parts=("a", "b", "c"))
SIZED = Op.of("concat", dim=0, parts=("a", "b", "c"), sizes=("part", "part", "part"))
ROWS = Rule(r"b\.(\d+)\.r", r"x.\1.r")
PARTS = RuleSet("parts", (Rule(r"b\.(\d+)\.(a|b|c)", r"x.\1", shard=r"\2", op=SIZED),), {"part": 2})


def layers(names: Sequence[str], shape: tuple[int, ...], count: int = 4) -> Shapes:
    return {f"b.{layer}.{name}": shape for layer in range(count) for name in names}


def reusing(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield views of one buffer, as model streamers do."""
    buffer = torch.empty(max(tensor.numel() for tensor in tensors.values()))
    for name, tensor in tensors.items():
        view = buffer[: tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        yield name, view
        buffer.fill_(float("nan"))


def assert_loads(rules: RuleSet, source: Shapes, target: Shapes, folder: Path) -> None:
    """Every loader gives the result of the plan, also from a stream that reuses its buffer."""
    tensors = {name: torch.randn(shape) for name, shape in source.items()}
    save_file(tensors, folder / "model.safetensors")
    expected = dict(convert(rules.compile(manifest_of(source), manifest_of(target)), tensors))
    for known in (folder, None):
        for stream in (tensors.items(), reusing(tensors), list(tensors.items())[::-1]):
            module = module_of(target)
            assert load_weights(module, stream, rules, folder=known) == set(target)
            assert all(torch.equal(module.get_parameter(name), tensor) for name, tensor in expected.items())
    module = module_of(target)
    assert load_local(module, folder, rules).loaded == set(target)
    assert all(torch.equal(module.get_parameter(name), tensor) for name, tensor in expected.items())


# -- layers --------------------------------------------------------------------------------------------------------


def test_every_layer_gets_its_own_numbers(tmp_path: Path) -> None:
    rules = RuleSet(
        "all",
        (
            Rule(r"b\.(\d+)\.(a|b|c)", r"x.\1.abc", shard=r"\2", op=JOIN),
            Rule(r"b\.(\d+)\.turned", r"x.\1.deep.turned", op="transpose"),
            Rule(r"b\.(\d+)\.e\.(\d+)\.w", r"x.\1.experts", shard=r"\2", op=Op.of("stack", dim=0)),
            Rule(r"b\.(\d+)\.late", r"x.{3 - \1}.late"),
            Rule(r"b\.(\d+)\.weight_(g|v)", r"x.\1.folded", shard=r"\2", op="weight_norm"),
            Rule(r"(n\.\d+\.w)", r"\1"),
        ),
    )
    source = layers(["a", "b", "c"], (2, 3)) | layers(["turned"], (2, 5)) | layers(["late"], (7,))
    source |= layers(["e.0.w", "e.1.w"], (4, 2)) | {f"n.{at}.w": (3,) for at in range(4)}
    source |= layers(["weight_g"], (4, 1, 1)) | layers(["weight_v"], (4, 2, 3))
    one = {"abc": (6, 3), "deep.turned": (5, 2), "experts": (2, 4, 2), "late": (7,), "folded": (4, 2, 3)}
    target = {f"x.{at}.{name}": shape for at in range(4) for name, shape in one.items()}
    assert_loads(rules, source, target | {f"n.{at}.w": (3,) for at in range(4)}, tmp_path)


def test_parts_of_other_widths_in_another_layer(tmp_path: Path) -> None:
    """b is alike in both layers; its place depends on a."""
    source = {"b.0.b": (3, 2), "b.1.b": (3, 2), "b.0.a": (1, 2), "b.1.a": (4, 2), "b.0.c": (5, 2), "b.1.c": (2, 2)}
    rules = RuleSet("widths", (Rule(r"b\.(\d+)\.(a|b|c)", r"x.\1", shard=r"\2", op=JOIN),))
    assert_loads(rules, source, {"x.0": (9, 2), "x.1": (9, 2)}, tmp_path)


def test_a_last_layer_of_another_shape(tmp_path: Path) -> None:
    rules = RuleSet("last", (Rule(r"b\.(\d+)\.w", (r"x.\1.p", r"x.\1.q"), op=Op.of("split", dim=0)), ROWS))
    source = {"b.0.w": (6, 2), "b.1.w": (6, 2), "b.2.w": (4, 2), "b.0.r": (3, 2), "b.1.r": (3, 2), "b.2.r": (5, 2)}
    target = {f"x.{at}.{part}": ((2, 2) if at == 2 else (3, 2)) for at in range(3) for part in "pq"}
    assert_loads(rules, source, target | {"x.0.r": (3, 2), "x.1.r": (3, 2), "x.2.r": (5, 2)}, tmp_path)


def test_a_layer_of_another_rule(tmp_path: Path) -> None:
    """It is square, so that only its values show that it was transposed."""
    rules = RuleSet("turned", (Rule(r"b\.2\.r", r"x.2.r", op="transpose"), Rule(r"b\.([013-9])\.r", r"x.\1.r")))
    assert_loads(rules, layers(["r"], (3, 3)), {f"x.{at}.r": (3, 3) for at in range(4)}, tmp_path)


@pytest.mark.parametrize("takes", [("[0:2]", "[2:]"), (r"[0:_1 + 1]", r"[_1 + 1:]")])
def test_regions_that_depend_on_the_layer(tmp_path: Path, takes: tuple[str, str]) -> None:
    source = {f"b.{at}.w": (4, 2) for at in (0, 1, 2)}
    first, second = ({at: (2 if takes[0] == "[0:2]" else at + 1) for at in (0, 1, 2)} for _ in range(2))
    target = {f"x.{at}.p": (first[at], 2) for at in first} | {f"x.{at}.q": (4 - second[at], 2) for at in second}
    rules = RuleSet(
        "regions",
        (Rule(r"b\.(\d+)\.w", r"x.\1.p", take=takes[0]), Rule(r"b\.(\d+)\.w", r"x.\1.q", take=takes[1])),
    )
    assert_loads(rules, source, target, tmp_path)


def test_a_layer_of_two_rules_is_ambiguous() -> None:
    rules = RuleSet("both", (ROWS, Rule(r"b\.2\.r", r"x.2.r", op="transpose")))
    with pytest.raises(RemapError) as caught:
        load_weights(module_of({f"x.{at}.r": (3, 3) for at in range(4)}), zeros(layers(["r"], (3, 3))).items(), rules)
    assert caught.value.details["problems"][0]["code"] == "remap_ambiguous"


@pytest.mark.parametrize(("shape", "dtype", "code"), [((3,), "float32", "remap_shape"), ((2,), "int64", "remap_dtype")])
def test_a_tensor_unlike_those_of_other_layers_is_refused(shape: tuple, dtype: str, code: str) -> None:
    tensors = zeros(layers(["r"], (2,), 3)) | {"b.2.r": torch.zeros(shape, dtype=getattr(torch, dtype))}
    with pytest.raises(RemapError) as caught:
        load_weights(module_of({f"x.{at}.r": (2,) for at in range(3)}), tensors.items(), RuleSet("unlike", (ROWS,)))
    assert caught.value.code == code and "b.2.r" in str(caught.value)


def test_a_layer_that_the_target_lacks_is_named() -> None:
    with pytest.raises(RemapError) as caught:
        load_weights(
            module_of({f"x.{at}.r": (2,) for at in range(3)}), zeros(layers(["r"], (2,))).items(), RuleSet("f", (ROWS,))
        )
    assert caught.value.code == "remap_beyond_layers" and "b.3.r" in caught.value.message


@pytest.mark.parametrize("shape", [(5, 2), (2,), (4, 3, 2)])
def test_a_target_unlike_those_of_other_layers_is_not_written(shape: tuple[int, ...]) -> None:
    target = {"x.0.r": (3, 2), "x.1.r": (3, 2), "x.2.r": shape}
    with pytest.raises(RemapError) as caught:
        load_weights(module_of(target), zeros(layers(["r"], (3, 2), 3)).items(), RuleSet("u", (ROWS,)))
    assert caught.value.code == "remap_shape" and "b.2.r" in str(caught.value)


@pytest.mark.parametrize("again", ["b.0.r", "b.1.r", "b.2.r"])
def test_a_tensor_that_comes_twice_is_refused(again: str) -> None:
    given = [*zeros(layers(["r"], (2,), 3)).items(), (again, torch.zeros(2, dtype=torch.float16))]
    with raises("remap_collision", again):
        load_weights(module_of({f"x.{layer}.r": (2,) for layer in range(3)}), given, RuleSet("twice", (ROWS,)))


@pytest.mark.parametrize("join", [JOIN, SIZED])
@pytest.mark.parametrize("missing", ["b.0.a", "b.1.b", "b.3.c"])
def test_a_part_that_one_layer_lacks_is_named(missing: str, join: Op) -> None:
    rules = RuleSet("parts", (Rule(r"b\.(\d+)\.(a|b|c)", r"x.\1", shard=r"\2", op=join),), {"part": 2})
    given = {name: tensor for name, tensor in zeros(layers("abc", (2, 3))).items() if name != missing}
    with pytest.raises(RemapError) as caught:
        load_weights(module_of({f"x.{at}": (6, 3) for at in range(4)}), given.items(), rules)
    [problem] = caught.value.details["problems"]
    assert (problem["code"], problem["target"]) == ("remap_incomplete_group", f"x.{missing[2]}")
    assert problem["source"] == missing


@pytest.mark.parametrize("order", [1, -1])
def test_a_problem_of_one_layer_does_not_hide_that_of_another(order: int) -> None:
    """A part of a wrong dtype explains the missing target of its own layer, and of no other."""
    given = {name: tensor for name, tensor in zeros(layers("abc", (2, 3))).items() if name != "b.2.a"}
    given["b.1.a"] = torch.ones(2, 3, dtype=torch.int64)
    names = sorted(given)[::order]
    with pytest.raises(RemapError) as caught:
        load_weights(module_of({f"x.{at}": (6, 3) for at in range(4)}), [(name, given[name]) for name in names], PARTS)
    found = {problem["target"]: problem["code"] for problem in caught.value.details["problems"]}
    assert found == {"x.1": "remap_dtype", "x.2": "remap_incomplete_group"}


def test_a_module_that_is_moved_during_a_load_gets_its_values() -> None:
    module = module_of({f"x.{at}": (6, 3) for at in range(4)})
    given = {name: torch.randn(shape) for name, shape in layers("abc", (2, 3)).items()}
    loader = WeightLoader(module, PARTS)
    for number, (name, tensor) in enumerate(given.items()):
        if number == 6:
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()
        loader.feed(name, tensor)
    assert len(loader.finish()) == 4
    for at in range(4):
        assert torch.equal(module.get_parameter(f"x.{at}"), torch.cat([given[f"b.{at}.{part}"] for part in "abc"]))


# -- streams -------------------------------------------------------------------------------------------------------


def test_one_source_that_waits_in_two_groups(tmp_path: Path) -> None:
    """Halves of m and of n are concatenated in two targets."""
    rules = RuleSet(
        "crossed",
        (
            Rule("(m|n)", "x", shard=r"\1", take="[0:2]", op=Op.of("concat", dim=0, parts=("m", "n"))),
            Rule("(m|n)", "y", shard=r"\1", take="[2:]", op=Op.of("concat", dim=0, parts=("n", "m"))),
        ),
    )
    assert_loads(rules, {"m": (5, 2), "n": (3, 2)}, {"x": (4, 2), "y": (4, 2)}, tmp_path)


def test_a_stream_that_differs_from_the_headers(tmp_path: Path) -> None:
    save_file(zeros({"a": (2,), "b": (2,)}), tmp_path / "m.safetensors")
    rules, target = RuleSet("same", (Rule("([ab])", r"\1"),)), {"a": (2,), "b": (2,)}
    with pytest.raises(RemapError) as caught:
        load_weights(module_of(target), [("a", torch.zeros(2))], rules, folder=tmp_path)
    assert caught.value.code == "remap_missing" and "m.safetensors" in caught.value.message
    with pytest.raises(RemapError) as caught:
        load_weights(module_of(target), zeros({"a": (2,), "b": (2,), "c": (2,)}).items(), rules, folder=tmp_path)
    assert caught.value.code == "remap_unexpected"
    module = module_of(target)
    load_weights(module, [("a", torch.ones(2).half()), ("b", torch.ones(2))], rules, folder=tmp_path)
    assert module.a.tolist() == [1, 1]
    with pytest.raises(RemapError) as caught:
        load_weights(module, [("a", torch.ones(3)), ("b", torch.ones(2))], rules, folder=tmp_path)
    assert caught.value.code == "remap_shape"


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.empty(3, 3, device="meta")],
    ids=["coo", "csr", "meta"],
)
def test_tensors_without_dense_values_are_refused_by_name(tensor: Tensor) -> None:
    with raises("remap_tensor", "block"):
        load_weights(module_of({"block": (3, 3)}), [("block", tensor)], RuleSet("same", (Rule("(.*)", r"\1"),)))


def test_names_that_are_too_long_to_match_are_told() -> None:
    name = "_fsdp_wrapped_module." * 20 + "w"
    plan = check(RuleSet("r", (Rule("(.*)", r"\1"),)), manifest_of({name: (1,)}), manifest_of({"w": (1,)}))
    assert any("421 characters" in problem.message for problem in plan.problems)


def test_both_names_of_a_shared_module_are_known() -> None:
    class Encoder(nn.Module):
        def __init__(self, table: nn.Module) -> None:
            super().__init__()
            self.embed_tokens = table

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Embedding(4, 3)
            self.encoder = Encoder(self.shared)

    same = RuleSet("same", (Rule("(.*)", r"\1"),))
    for names in (["shared.weight"], ["encoder.embed_tokens.weight"]):
        module = Model()
        assert load_weights(module, [(name, torch.ones(4, 3)) for name in names], same) == {"shared.weight"}
        assert bool((module.shared.weight == 1).all())


# -- one source for several targets --------------------------------------------------------------------------------

TWO = RuleSet("two", (Rule("wq", "a"), Rule("wq", "b"), Rule("wk", "k")))


def test_rules_of_one_pattern_copy_a_source_to_each_target(tmp_path: Path) -> None:
    assert_loads(TWO, {"wq": (4, 3), "wk": (2,)}, {"a": (4, 3), "b": (4, 3), "k": (2,)}, tmp_path)
    turned = RuleSet("turned", (Rule("wq", "a"), Rule("wq", ("b", "c"), op=Op.of("split", dim=0))))
    assert_loads(turned, {"wq": (4, 3)}, {"a": (4, 3), "b": (2, 3), "c": (2, 3)}, tmp_path)


def test_copies_are_exported_once_if_they_agree() -> None:
    plan = TWO.compile(manifest_of({"wq": (4,), "wk": (2,)}), manifest_of({"a": (4,), "b": (4,), "k": (2,)}))
    values = {"a": torch.arange(4.0), "b": torch.arange(4.0), "k": torch.ones(2)}
    assert dict(export(plan, values))["wq"].tolist() == [0, 1, 2, 3]
    restored = dict(convert(invert(plan).compile(plan.target, plan.source), values))
    assert restored["wq"].tolist() == [0, 1, 2, 3]
    with pytest.raises(RemapError) as caught:
        dict(export(plan, values | {"b": torch.ones(4)}))
    assert caught.value.code == "remap_op" and "wq" in caught.value.message


def test_a_copy_that_uses_a_part_only_is_an_error() -> None:
    rules = RuleSet("part", (Rule("wq", "a"), Rule("wq", "b", op=Op.of("reorder", dim=0, runs=[[0, 2]]))))
    plan = check(rules, manifest_of({"wq": (4,)}), manifest_of({"a": (4,), "b": (2,)}))
    assert [problem.code for problem in plan.problems] in ([], ["remap_unused"])
    both = RuleSet("both", (Rule("wq", "a"), Rule("wq", "a", op="transpose")))
    plan = check(both, manifest_of({"wq": (4, 4)}), manifest_of({"a": (4, 4)}))
    assert [problem.code for problem in plan.problems] == ["remap_collision"]


@pytest.mark.parametrize("part", [{"take": "[0:2]"}, {"op": Op.of("reorder", dim=0, runs=[[0, 2]])}])
def test_a_source_is_restored_from_its_complete_copy(part: dict) -> None:
    rules = RuleSet("part", (Rule("wq", "b", **part), Rule("wq", "a")))
    plan = rules.compile(manifest_of({"wq": (4,)}), manifest_of({"a": (4,), "b": (2,)}))
    given = {"wq": torch.randn(4)}
    converted = dict(convert(plan, given))
    assert torch.equal(dict(export(plan, converted))["wq"], given["wq"])
    converted["b"] += 1
    with pytest.raises(RemapError) as caught:
        dict(export(plan, converted))
    assert caught.value.code == "remap_op"


def test_a_source_is_restored_from_its_exact_copy() -> None:
    rules = RuleSet("rounded", (Rule("wq", "b"), Rule("wq", "a")))
    target = Manifest({"a": ((2,), "float32"), "b": ((2,), "bfloat16")})
    plan, given = rules.compile(manifest_of({"wq": (2,)}), target, allow_downcast=True), torch.tensor([1.001, 2.0])
    assert torch.equal(dict(export(plan, dict(convert(plan, {"wq": given}))))["wq"], given)


def test_shards_of_a_fused_target_are_known_by_name() -> None:
    slots = {"q": ((0, 2), (0, 3)), "k": ((2, 3), (0, 3))}
    target = Manifest({"qk": TensorSpec((3, 3), "float32", slots=slots)})
    rules = RuleSet("slots", (Rule(r"(q|k)", "qk", shard=r"\1"),))
    plan = rules.compile(manifest_of({"q": (2, 3), "k": (1, 3)}), target)
    assert [(task.shard, task.region) for task in plan.tasks] == list(slots.items())


# -- layers that are resolved before they arrive ---------------------------------------------------------------------


def _layers(count: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {f"blocks.{at}.w": torch.full((2, 3), float(at + 1), dtype=dtype) for at in range(count)}


def _layers_module(count: int) -> nn.Module:
    return module_of({f"layers.{at}.w": (2, 3) for at in range(count)})


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_layers_of_any_order_shape_and_dtype(order: list[int]) -> None:
    """A layer whose dtype differs from that of the layer before is resolved again, and still complete."""
    weights = _layers(4)
    weights["blocks.2.w"] = weights["blocks.2.w"].bfloat16()
    module = _layers_module(4)
    rules = RuleSet("r", (Rule(r"blocks\.(\d+)\.w", r"layers.\1.w"),))
    load_weights(module, ((f"blocks.{at}.w", weights[f"blocks.{at}.w"]) for at in order), rules)
    for at in range(4):
        assert (module.get_parameter(f"layers.{at}.w") == at + 1).all()


def test_layers_that_are_expected_and_do_not_come_are_missing() -> None:
    module = _layers_module(4)
    rules = RuleSet("r", (Rule(r"blocks\.(\d+)\.w", r"layers.\1.w"),))
    with pytest.raises(RemapError) as raised:
        load_weights(module, list(_layers(4).items())[:2], rules)
    found = raised.value.details["problems"]
    assert {problem["target"] for problem in found} == {"layers.2.w", "layers.3.w"}


def test_all_layers_into_one_target_collide() -> None:
    with pytest.raises(RemapError) as raised:
        load_weights(module_of({"w": (2, 3)}), _layers(3).items(), RuleSet("r", (Rule(r"blocks\.\d+\.w", "w"),)))
    assert raised.value.code == "remap_collision"
