"""Operations of a weight are applied to its adapter exactly, or are an error by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from port_kit.errors import RemapError
from port_kit.manifest import Manifest
from port_kit.remap import Op, Rule, RuleSet
from port_kit.remap.lora import remap_lora, select
from port_kit.remap.tensor_ops import Reorder
from port_kit.remap.transforms import transform


@transform("lora_rotary_rows", shape=lambda parts, args: parts[""])
def rotary_rows(parts: dict, args: dict) -> Tensor:
    w = parts[""]
    return w.reshape(2, w.shape[0] // 4, 2, -1).transpose(1, 2).reshape(w.shape)


@transform("lora_every_second_column", shape=lambda parts, args: (parts[""][0], parts[""][1] // 2))
def every_second_column(parts: dict, args: dict) -> Tensor:
    return parts[""][:, ::2]


@transform("lora_shuffled_in_rows", shape=lambda parts, args: parts[""])
def shuffled_in_rows(parts: dict, args: dict) -> Tensor:
    return torch.stack([row.roll(number) for number, row in enumerate(parts[""])])


@transform("lora_doubled", shape=lambda parts, args: parts[""])
def doubled(parts: dict, args: dict) -> Tensor:
    return parts[""] * 2


@transform("lora_means", shape=lambda parts, args: parts[""])
def means(parts: dict, args: dict) -> Tensor:
    """The identity on tensors whose rows, or whose columns, are constant."""
    w = parts[""]
    return w.mean(1, keepdim=True) + w.mean(0, keepdim=True) - w.mean()


@transform("lora_one_plus", shape=lambda parts, args: parts[""])
def one_plus(parts: dict, args: dict) -> Tensor:
    return parts[""] + 1


@transform("lora_no_floats", shape=lambda parts, args: parts[""])
def no_floats(parts: dict, args: dict) -> Tensor:
    return parts[""] ^ 1


FOLLOWED = {
    "reorder rows": (Op.of("reorder", dim=0, parts=2, order=(1, 0)), (8, 6), lambda w: torch.cat([w[4:], w[:4]])),
    "some rows": (Op.of("reorder", dim=0, runs=((4, 6), (0, 2))), (8, 6), lambda w: torch.cat([w[4:6], w[:2]])),
    "reorder columns": (Op.of("reorder", dim=1, parts=2, order=(1, 0)), (8, 6), lambda w: w.roll(3, 1)),
    "rotary": (
        Op.of("rearrange", pattern="(h d two) i -> (h two d) i", sizes=[["h", 2], ["two", 2]]),
        (8, 6),
        lambda w: w.reshape(2, 2, 2, 6).transpose(1, 2).reshape(8, 6),
    ),
    "rows and columns": (
        Op.of("rearrange", pattern="(a b) (c d) -> (b a) (d c)", sizes=[["a", 2], ["c", 2]]),
        (8, 6),
        lambda w: w.reshape(2, 4, 2, 3).permute(1, 0, 3, 2).reshape(8, 6),
    ),
    "convolution to linear": (Op.of("rearrange", pattern="o i k -> o (k i)"), (8, 3, 2), lambda w: w.mT.flatten(1)),
    "window of one": (Op.of("reshape"), (8, 6, 1, 1), lambda w: w.flatten(1)),
    "transform of rows": (Op.of("lora_rotary_rows"), (8, 6), lambda w: rotary_rows({"": w}, {})),
    "transform of columns": (Op.of("lora_every_second_column"), (8, 6), lambda w: w[:, ::2]),
    "two ops and a cast": (
        (Op.of("cast", dtype="bfloat16"), Op.of("reorder", dim=0, parts=2, order=(1, 0)), Op.of("lora_rotary_rows")),
        (8, 6),
        lambda w: rotary_rows({"": torch.cat([w[4:], w[:4]])}, {}),
    ),
}


@pytest.mark.parametrize(("op", "shape", "wanted"), FOLLOWED.values(), ids=FOLLOWED)
def test_the_product_follows_the_weight(op: Op, shape: tuple, wanted: object) -> None:
    rules = RuleSet("r", (Rule(r"m\.weight", "n.weight", op=op),))
    a, b = torch.randn(2, *shape[1:]), torch.randn(shape[0], 2, *[1] * (len(shape) - 2))
    product = (b.flatten(1) @ a.flatten(1)).reshape(shape)
    expected = wanted(product)
    target = Manifest({"n.weight": (tuple(expected.shape), "float32")})
    lora = {"m.lora_A.weight": a, "m.lora_B.weight": b, "m.alpha": torch.tensor(2.0)}
    found = remap_lora(lora, rules, target=target)
    got = found["n.lora_B.weight"].flatten(1) @ found["n.lora_A.weight"].flatten(1)
    assert torch.allclose(got.reshape(expected.shape), expected, atol=1e-6)
    assert found["n.alpha"] == 2.0
    difference = remap_lora({"m.diff": product}, rules, target=target)["n.diff"]
    assert torch.equal(difference, expected)


REFUSED = {
    "transpose": Op.of("transpose"),
    "rows with columns": Op.of("rearrange", pattern="(a b) c -> (a c) b", sizes=[["b", 4]]),
    "each row in its own way": Op.of("lora_shuffled_in_rows"),
    "values doubled": Op.of("lora_doubled"),
    "values averaged": Op.of("lora_means"),
    "values shifted": Op.of("lora_one_plus"),
    "integers alone": Op.of("lora_no_floats"),
}


@pytest.mark.parametrize("op", REFUSED.values(), ids=REFUSED)
def test_what_is_no_selection_of_rows_and_columns_is_refused(op: Op) -> None:
    rules = RuleSet("r", (Rule(r"m\.weight", "n.weight", op=op),))
    target = Manifest({"n.weight": ((4, 4), "float32")})
    lora = {"m.lora_A.weight": torch.ones(2, 4), "m.lora_B.weight": torch.ones(4, 2)}
    with pytest.raises(RemapError) as caught:
        remap_lora(lora, rules, target=target)
    assert caught.value.code == "remap_op"
    if op.name.startswith("lora_"):  # the difference of a weight is not a weight: no transform is applied
        with pytest.raises(RemapError):
            remap_lora({"m.diff": torch.ones(4, 4)}, rules, target=target)
    else:
        assert remap_lora({"m.diff": torch.ones(4, 4)}, rules, target=target)["n.diff"].shape == (4, 4)


def test_a_difference_is_moved_by_the_rule_of_its_own_tensor() -> None:
    swap = Op.of("reorder", dim=0, parts=2, order=(1, 0))
    rules = RuleSet("r", (Rule(r"m\.weight", "n.weight"), Rule(r"m\.bias", "n.bias", op=swap)))
    target = Manifest({"n.weight": ((4, 6), "float32"), "n.bias": ((4,), "float32")})
    bias, weight = torch.arange(4.0), torch.randn(4, 6)
    found = remap_lora({"m.diff_b": bias, "m.diff": weight}, rules, target=target)
    assert found["n.diff_b"].tolist() == [2, 3, 0, 1] and torch.equal(found["n.diff"], weight)
    with pytest.raises(RemapError) as caught:
        remap_lora({"m.diff_b": bias}, rules)
    assert caught.value.code == "remap_op"


def test_norms_and_parameters_without_a_module_have_differences() -> None:
    rules = RuleSet("r", (Rule(r"norm\.weight", "ln.weight"), Rule("modulation", "scale")))
    target = Manifest({"ln.weight": ((6,), "float32"), "scale": ((1, 6, 4), "float32")})
    lora = {"norm.diff": torch.randn(6), "modulation.diff": torch.randn(1, 6, 4)}
    found = remap_lora(lora, rules, target=target)
    assert torch.equal(found["ln.diff"], lora["norm.diff"]) and torch.equal(
        found["scale.diff"], lora["modulation.diff"]
    )


QKV = RuleSet(
    "qkv", (Rule(r"m\.qkv\.(weight|bias)", (r"q.\1", r"k.\1", r"v.\1"), op=Op.of("split", dim=0, sizes=(4, 2, 2))),)
)
ROWS = {"q": slice(0, 4), "k": slice(4, 6), "v": slice(6, 8)}


def _qkv(bias: bool) -> Manifest:
    tensors = {f"{name}.weight": ((rows.stop - rows.start, 6), "float32") for name, rows in ROWS.items()}
    if bias:
        tensors |= {f"{name}.bias": ((rows.stop - rows.start,), "float32") for name, rows in ROWS.items()}
    return Manifest(tensors)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("magnitude", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
@pytest.mark.parametrize("layout", [(8,), (8, 1)])
def test_biases_and_magnitudes_are_split_like_rows(bias: bool, magnitude: str, layout: tuple) -> None:
    values = torch.arange(8.0)
    lora = {
        "m.qkv.lora_A.weight": torch.randn(2, 6),
        "m.qkv.lora_B.bias": values,  # before the weight, as a safetensors file has it
        "m.qkv.lora_B.weight": torch.randn(8, 2),
        "m.qkv.lora_A.bias": torch.randn(2),
        f"m.qkv.{magnitude}": values.reshape(layout),
    }
    found = remap_lora(lora, QKV, target=_qkv(bias))
    for name, rows in ROWS.items():
        assert torch.equal(found[f"{name}.lora_A.weight"], lora["m.qkv.lora_A.weight"])
        assert torch.equal(found[f"{name}.lora_A.bias"], lora["m.qkv.lora_A.bias"])
        assert torch.equal(found[f"{name}.lora_B.weight"], lora["m.qkv.lora_B.weight"][rows])
        assert torch.equal(found[f"{name}.lora_B.bias"], values[rows])
        assert torch.equal(found[f"{name}.{magnitude}"], values[rows].reshape(-1, *layout[1:]))


@pytest.mark.parametrize("leaf", ["dora_scale", "lora_B.bias", "lora_A.bias"])
def test_what_belongs_to_all_columns_is_not_split_with_them(leaf: str) -> None:
    halves = RuleSet("halves", (Rule(r"m\.weight", ("l.weight", "r.weight"), op=Op.of("split", dim=1)),))
    swap = RuleSet("swap", (Rule(r"m\.weight", "n.weight", op=Op.of("reorder", dim=1, parts=2, order=(1, 0))),))
    count = 2 if leaf == "lora_A.bias" else 8
    lora = {"m.lora_A.weight": torch.randn(2, 6), "m.lora_B.weight": torch.randn(8, 2), f"m.{leaf}": torch.randn(count)}
    found = remap_lora(lora, swap, target=Manifest({"n.weight": ((8, 6), "float32")}))
    assert torch.equal(found[f"n.{leaf}"], lora[f"m.{leaf}"])
    with pytest.raises(RemapError) as caught:
        remap_lora(lora, halves, target=Manifest({"l.weight": ((8, 3), "float32"), "r.weight": ((8, 3), "float32")}))
    assert caught.value.code == "remap_op"


def test_the_magnitude_of_a_convolution_follows_its_outputs() -> None:
    swap = (Op.of("reorder", dim=0, parts=2, order=(1, 0)), Op.of("rearrange", pattern="o i k -> o (i k)"))
    rules = RuleSet("r", (Rule(r"m\.weight", "n.weight", op=swap),))
    lora = {"m.lora_A.weight": torch.randn(2, 3, 3), "m.lora_B.weight": torch.randn(4, 2, 1)}
    lora["m.lora_magnitude_vector"] = torch.arange(4.0).reshape(1, 4, 1)
    found = remap_lora(lora, rules, target=Manifest({"n.weight": ((4, 9), "float32")}))
    assert found["n.lora_magnitude_vector"].tolist() == [[[2], [3], [0], [1]]]


def test_a_magnitude_over_inputs_follows_the_columns() -> None:
    rules = RuleSet("r", (Rule(r"m\.weight", ("l.weight", "r.weight"), op=Op.of("split", dim=1)),))
    target = Manifest({"l.weight": ((6, 3), "float32"), "r.weight": ((6, 3), "float32")})
    lora = {"m.lora_A.weight": torch.randn(2, 6), "m.lora_B.weight": torch.randn(6, 2)}
    lora["m.dora_scale"] = torch.arange(6.0).reshape(1, 6)
    found = remap_lora(lora, rules, target=target)
    assert found["r.dora_scale"].tolist() == [[3, 4, 5]]


PLAIN = RuleSet("plain", (Rule(r"blocks\.(\d+)\.attn\.(weight|bias)", r"layers.\1.attn.\2"),))
TARGET = Manifest({"layers.0.attn.weight": ((12, 6), "float32"), "layers.0.attn.bias": ((12,), "float32")})


def _pair(rows: int = 12, columns: int = 6, rank: int = 2, module: str = "blocks.0.attn", label: str = "") -> dict:
    return {
        f"{module}.lora_A{label}.weight": torch.zeros(rank, columns),
        f"{module}.lora_B{label}.weight": torch.zeros(rows, rank),
    }


@pytest.mark.parametrize(
    ("lora", "code"),
    [
        (_pair(module="blocks.7.attn"), "remap_beyond_layers"),
        (_pair(rows=20), "remap_shape"),
        (_pair(columns=9), "remap_shape"),
        ({"blocks.0.attn.lora_A.weight": torch.zeros(2, 6)}, "remap_incomplete_group"),
        ({"blocks.0.attn.lora_up.weight": torch.zeros(12, 2)}, "remap_incomplete_group"),
        ({"blocks.0.attn.alpha": torch.tensor(1.0)}, "remap_incomplete_group"),
        ({"blocks.0.attn.dora_scale": torch.zeros(12)}, "remap_incomplete_group"),
        (_pair() | {"blocks.0.attn.lora_B.weight": torch.zeros(12, 5)}, "remap_shape"),
        (_pair() | {"blocks.0.attn.lora_B.weight": torch.zeros(12)}, "remap_shape"),
        (_pair() | {"blocks.0.attn.lora_A.weight": torch.zeros(2, 6, 3)}, "remap_shape"),
        (_pair() | {"blocks.0.attn.lora_B.weight": torch.zeros(12, 2, 3)}, "remap_shape"),
        (_pair() | {"blocks.0.attn.lora_magnitude_vector": torch.zeros(11)}, "remap_shape"),
        (_pair() | {"blocks.0.attn.dora_scale": torch.zeros(6)}, "remap_shape"),
        (_pair() | {"blocks.0.attn.dora_scale": torch.zeros(1, 12)}, "remap_shape"),
        (_pair() | {"blocks.0.attn.lora_B.bias": torch.zeros(6)}, "remap_shape"),
        (_pair() | {"blocks.0.attn.lora_A.bias": torch.zeros(6)}, "remap_shape"),
        (_pair() | {"blocks.0.attn.alpha": torch.zeros(2)}, "remap_shape"),
        (_pair() | {"blocks.0.attn.diff": torch.zeros(12, 5)}, "remap_shape"),
        (_pair() | {"blocks.0.attn.diff_b": torch.zeros(6)}, "remap_shape"),
        (_pair() | {"blocks.0.attn.lora.down.weight": torch.zeros(2, 6)}, "remap_collision"),
        (_pair(label=".default") | {"blocks.0.attn.lora_A.other.weight": torch.zeros(2, 6)}, "remap_incomplete_group"),
        (_pair(module="blocks.0.mlp"), "remap_unexpected"),
    ],
)
def test_an_adapter_is_checked_against_the_target(lora: dict[str, Tensor], code: str) -> None:
    with pytest.raises(RemapError) as caught:
        remap_lora(lora, PLAIN, target=TARGET)
    assert caught.value.code == code


def test_the_adapter_of_a_weight_that_is_used_twice_goes_to_both_modules() -> None:
    rules = RuleSet("r", tuple(Rule(r"wq\.weight", f"attn{number}.weight") for number in (1, 2)))
    target = Manifest({f"attn{number}.weight": ((12, 6), "float32") for number in (1, 2)})
    for known in (None, target):
        found = remap_lora(_pair(module="wq"), rules, target=known)
        assert set(found) == {f"attn{number}.lora_{half}.weight" for number in (1, 2) for half in "AB"}


def test_rules_that_contradict_each_other_are_refused_without_a_target_too() -> None:
    rules = RuleSet("r", (Rule(r"wq\.weight", "a.weight"), Rule(r"w.\.weight", "b.weight")))
    for known in (None, TARGET):
        with pytest.raises(RemapError) as caught:
            remap_lora(_pair(module="wq"), rules, target=known)
        assert caught.value.code == "remap_ambiguous"


def test_several_adapters_of_one_module_keep_their_names_and_ranks() -> None:
    lora = _pair(label=".default") | _pair(rank=5, label=".other")
    assert {name: tensor.shape for name, tensor in remap_lora(lora, PLAIN, target=TARGET).items()} == {
        name.replace("blocks", "layers"): tensor.shape for name, tensor in lora.items()
    }


def test_a_large_weight_is_selected_by_rows_and_not_by_index_pairs() -> None:
    shape = (14336, 5120)
    found = select([Reorder(0, ((7168, 14336), (0, 7168)), shape)], shape)
    assert found is not None and found.columns is None and found.rows is not None
    assert found.rows[0] == 7168 and len(found.rows) == shape[0]
