"""Loading from streams: who owns what, which names a checkpoint has, and what makes layers differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from port_kit.errors import RemapError
from port_kit.manifest import NAMING_KEY, Manifest, TensorSpec
from port_kit.remap import Op, Rule, RuleSet, load_local, load_weights
from port_kit.remap.export import checkpoint_reader, convert, convert_file, export, export_file
from port_kit.remap.invert import invert
from port_kit.remap.load import WeightLoader
from port_kit.remap.plan import check
from tests.remap.shapes import manifest_of, module_of
from tests.remap.worlds import Shapes

JOIN = Op.of("concat", dim=0, parts=("a", "b", "c"))
SIZED = Op.of("concat", dim=0, parts=("a", "b", "c"), sizes=("part", "part", "part"))
ROWS = Rule(r"b\.(\d+)\.r", r"x.\1.r")
PARTS = RuleSet("parts", (Rule(r"b\.(\d+)\.(a|b|c)", r"x.\1", shard=r"\2", op=SIZED),), {"part": 2})


def layers(names: Sequence[str], shape: tuple[int, ...], count: int = 4) -> Shapes:
    return {f"b.{layer}.{name}": shape for layer in range(count) for name in names}


def zeros(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def reusing(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield views of one buffer, as model streamers do."""
    buffer = torch.empty(max(tensor.numel() for tensor in tensors.values()))
    for name, tensor in tensors.items():
        view = buffer[: tensor.numel()].view(tensor.shape)
        view.copy_(tensor)
        yield name, view
        buffer.fill_(float("nan"))


def assert_loads(rules: RuleSet, source: Shapes, target: Shapes, folder: Path) -> None:
    """Every way to load gives what the plan converts, also from a stream that reuses its buffer."""
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
    with pytest.raises(RemapError, match=f"{again} comes twice") as caught:
        load_weights(module_of({f"x.{layer}.r": (2,) for layer in range(3)}), given, RuleSet("twice", (ROWS,)))
    assert caught.value.code == "remap_collision"


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
    """A part of a wrong dtype accounts for what its own layer lacks, and for no other."""
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
    with pytest.raises(RemapError, match="block") as caught:
        load_weights(module_of({"block": (3, 3)}), [("block", tensor)], RuleSet("same", (Rule("(.*)", r"\1"),)))
    assert caught.value.code == "remap_tensor"


def test_names_that_are_too_long_to_match_are_told() -> None:
    name = "_fsdp_wrapped_module." * 20 + "w"
    plan = check(RuleSet("r", (Rule("(.*)", r"\1"),)), manifest_of({name: (1,)}), manifest_of({"w": (1,)}))
    assert any("421 characters" in problem.message for problem in plan.problems)


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


# -- original and converted names ----------------------------------------------------------------------------------

SWAP = RuleSet(
    "swap",
    (
        Rule(r"b\.(\d+)\.norm2", r"b.\1.norm3"),
        Rule(r"b\.(\d+)\.norm3", r"b.\1.norm2"),
        Rule(r"b\.(\d+)\.fused", r"b.\1.fused", op=Op.of("reorder", dim=0)),
        Rule("(.*)", r"\1", fallback=True),
    ),
)
SWAPPED = {f"b.{at}.{name}": (4,) for at in range(2) for name in ("norm1", "norm2", "norm3", "fused")}


def ways(tensors: dict[str, Tensor], folder: Path, rules: RuleSet, target: Shapes) -> Iterator[nn.Module]:
    for known in (folder, None):
        module = module_of(target)
        load_weights(module, tensors.items(), rules, folder=known)
        yield module
    module = module_of(target)
    load_local(module, folder, rules)
    yield module


def test_rules_are_applied_to_original_names_that_are_names_of_the_target(tmp_path: Path) -> None:
    tensors = {name: torch.randn(shape) for name, shape in SWAPPED.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    for module in ways(tensors, tmp_path, SWAP, SWAPPED):
        assert torch.equal(module.get_parameter("b.1.norm3"), tensors["b.1.norm2"])
        assert torch.equal(module.get_parameter("b.1.fused"), tensors["b.1.fused"].roll(2))


def test_converted_files_record_it_and_are_not_converted_again(tmp_path: Path) -> None:
    original, converted, back = (tmp_path / name for name in ("original", "converted", "back"))
    original.mkdir()
    tensors = {name: torch.randn(shape) for name, shape in SWAPPED.items()}
    save_file(tensors, original / "m.safetensors")
    plan = SWAP.compile(Manifest.from_checkpoint(original), manifest_of(SWAPPED))
    convert_file(plan, checkpoint_reader(original, plan.source), converted / "m.safetensors")
    assert Manifest.from_checkpoint(original).naming == ""
    assert Manifest.from_checkpoint(converted).naming == "converted:swap"
    one, two, explicit = (module_of(SWAPPED) for _ in range(3))
    load_local(one, original, SWAP)
    load_local(two, converted, SWAP)
    load_weights(explicit, load_file(converted / "m.safetensors").items(), SWAP, converted=True)
    assert check(SWAP, Manifest.from_checkpoint(converted), manifest_of(SWAPPED)).converted
    for name, tensor in one.named_parameters():
        assert torch.equal(two.get_parameter(name), tensor) and torch.equal(explicit.get_parameter(name), tensor)
    inverse = invert(plan).compile(Manifest.from_checkpoint(converted), plan.source)  # not converted by these rules
    assert not inverse.converted
    restored = dict(convert(inverse, load_file(converted / "m.safetensors")))
    assert all(torch.equal(restored[name], tensor) for name, tensor in tensors.items())
    export_file(plan, two, back / "m.safetensors")
    assert Manifest.from_checkpoint(back).naming == "original"
    restored = load_file(back / "m.safetensors")
    assert all(torch.equal(restored[name], tensor) for name, tensor in tensors.items())


def test_a_record_that_is_wrong_for_the_target_is_an_error(tmp_path: Path) -> None:
    save_file({"p": torch.ones(2)}, tmp_path / "m.safetensors", metadata={NAMING_KEY: "converted"})
    rules = RuleSet("r", (Rule("p", "q"),))
    with pytest.raises(RemapError) as caught:
        load_local(module_of({"q": (2,)}), tmp_path, rules)
    assert caught.value.details["problems"][0]["source"] == "p"
    module = module_of({"q": (2,)})
    load_weights(module, [("p", torch.ones(2))], rules, folder=tmp_path, converted=False)
    assert module.q.tolist() == [1, 1]


def test_names_that_no_rule_matches_pass_if_all_are_names_of_the_target(tmp_path: Path) -> None:
    """Rules keep their meaning: a kept target may be absent, a missing one is an error."""
    rules = RuleSet("r", (Rule("p", "proj"), Rule("o", "out"), Rule(target="steps", keep="the module makes it")))
    target = {"proj": (3,), "out": (2,), "steps": (2,)}
    tensors = zeros({"proj": (3,), "out": (2,)})
    save_file(tensors, tmp_path / "m.safetensors")
    for module in ways(tensors, tmp_path, rules, target):
        assert module.proj.tolist() == [0, 0, 0]
    with pytest.raises(RemapError) as caught:
        load_weights(module_of(target), [("proj", torch.zeros(3))], rules)
    assert caught.value.code == "remap_missing"
    with pytest.raises(RemapError) as caught:
        load_weights(module_of(target), tensors.items(), rules, converted=False)
    assert {problem["code"] for problem in caught.value.details["problems"]} >= {"remap_unexpected"}


def test_rules_that_change_values_are_never_skipped_for_their_names(tmp_path: Path) -> None:
    """A pattern with a slip matches nothing, and the names are equal on both sides."""
    rules = RuleSet("slip", (Rule(r"norm_ouT", "norm_out", op=Op.of("reorder", dim=0)),))
    tensors = zeros({"norm_out": (4,)})
    save_file(tensors, tmp_path / "m.safetensors")
    for folder in (tmp_path, None):
        with pytest.raises(RemapError) as caught:
            load_weights(module_of({"norm_out": (4,)}), tensors.items(), rules, folder=folder)
        codes = {problem["code"] for problem in caught.value.details["problems"]}
        assert codes >= {"remap_unexpected", "remap_dead_rule"}
    load_weights(module_of({"norm_out": (4,)}), tensors.items(), rules, converted=True)


def test_names_of_the_target_that_another_rule_set_converted_are_ambiguous(tmp_path: Path) -> None:
    """They may be converted for this module, or be what these rules convert."""
    tensors = zeros(SWAPPED)
    save_file(tensors, tmp_path / "m.safetensors", metadata={NAMING_KEY: "converted:swap_of_last_year"})
    with pytest.raises(RemapError) as caught:
        load_local(module_of(SWAPPED), tmp_path, SWAP)
    assert caught.value.code == "remap_mixed"
    for converted in (True, False):
        load_weights(module_of(SWAPPED), tensors.items(), SWAP, folder=tmp_path, converted=converted)
    renaming = RuleSet("port", (Rule(r"b\.(\d+)\.(\w+)", r"blocks.\1.\2"),))
    load_local(module_of({f"blocks{name[1:]}": shape for name, shape in SWAPPED.items()}), tmp_path, renaming)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("forgotten", ["pos_embed", "layers.7.weight"])
def test_a_forgotten_rule_is_told_as_such(order: int, forgotten: str) -> None:
    """One tensor has a name of the target and no rule; all others are renamed."""
    rules = RuleSet("r", (Rule(r"blocks\.(\d+)\.(weight|bias)", r"layers.\1.\2"),))
    source = {forgotten: (3,), "blocks.0.weight": (2, 2), "blocks.0.bias": (2,)}
    target = {forgotten: (3,), "layers.0.weight": (2, 2), "layers.0.bias": (2,)}
    with pytest.raises(RemapError) as caught:
        load_weights(module_of(target), list(zeros(source).items())[::order], rules)
    found = {(problem["code"], problem.get("source", "")) for problem in caught.value.details["problems"]}
    assert ("remap_unexpected", forgotten) in found and not any("blocks.0" in source for _, source in found)


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
