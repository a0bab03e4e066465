"""LoRA files are renamed to the port's modules; other tensors and unknown modules are errors by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from port_kit.errors import RemapError
from port_kit.manifest import Manifest, TensorSpec
from port_kit.remap import Op, Rule, RuleSet, load_weights
from port_kit.remap.lora import remap_lora, restore_names
from tests.helpers import raises
from tests.remap.linears import Linear

RULES = RuleSet(
    "base",
    (
        Rule(r"blocks\.(\d+)\.attn\.(q|k|v)\.(weight|bias)", r"layers.\1.attn.qkv.\3", shard=r"\2"),
        Rule(r"blocks\.(\d+)\.ffn\.0\.(weight|bias)", r"layers.\1.ffn.up.\2"),
        Rule(r"blocks\.(\d+)\.modulation", r"layers.\1.scale"),
        Rule(r"linear1\.weight", ("a.weight", "b.weight"), op=Op.of("split", dim=0)),
        Rule(r"teacher\.(.*)", drop="only for training"),
    ),
)


@pytest.mark.parametrize(
    "prefix",
    ["", "diffusion_model.", "base_model.model.", "model.diffusion_model.", "unet.", "base_model.model.transformer."],
)
def test_names_follow_the_base_model(prefix: str) -> None:
    source = {
        f"{prefix}blocks.3.attn.q.lora_A.weight": 1,
        f"{prefix}blocks.3.attn.q.lora_B.weight": 2,
        f"{prefix}blocks.3.attn.k.lora_A.default.weight": 3,
        f"{prefix}blocks.0.ffn.0.lora_down.weight": 4,
        f"{prefix}blocks.0.ffn.0.alpha": 5,
        f"{prefix}blocks.0.ffn.0.lora.up.weight": 6,
        f"{prefix}blocks.0.ffn.0.lora_B.bias": 7,
        f"{prefix}blocks.0.ffn.0.lora_magnitude_vector.default.weight": 8,
        f"{prefix}blocks.0.ffn.0.dora_scale": 9,
        f"{prefix}blocks.0.ffn.0.diff": 10,
        f"{prefix}blocks.0.ffn.0.diff_b": 11,
        f"{prefix}blocks.0.modulation.diff": 12,
    }
    assert remap_lora(source, RULES) == {
        "layers.3.attn.q.lora_A.weight": 1,
        "layers.3.attn.q.lora_B.weight": 2,
        "layers.3.attn.k.lora_A.default.weight": 3,
        "layers.0.ffn.up.lora_down.weight": 4,
        "layers.0.ffn.up.alpha": 5,
        "layers.0.ffn.up.lora.up.weight": 6,
        "layers.0.ffn.up.lora_B.bias": 7,
        "layers.0.ffn.up.lora_magnitude_vector.default.weight": 8,
        "layers.0.ffn.up.dora_scale": 9,
        "layers.0.ffn.up.diff": 10,
        "layers.0.ffn.up.diff_b": 11,
        "layers.0.scale.diff": 12,
    }


def test_a_module_may_be_called_like_a_part_of_an_adapter() -> None:
    rules = RuleSet("r", (Rule(r"x\.(alpha|diff)\.weight", r"y.\1.weight"),))
    assert set(remap_lora({"x.alpha.lora_A.weight": 0, "x.diff.alpha": 0}, rules)) == {
        "y.alpha.lora_A.weight",
        "y.diff.alpha",
    }


@pytest.mark.parametrize("form", ["lora_A.weight lora_B.weight", "lora_down.weight lora_up.weight"])
def test_adapters_of_fused_projections_act_on_their_rows(form: str) -> None:
    """Merging a LoRA before the load, or into the loaded rows by its new names and shards, gives the same weights."""
    inputs, rows, rank = 6, {"q": 8, "k": 4, "v": 4}, 2
    down, up = form.split()
    base = {f"blocks.0.attn.{part}.weight": torch.randn(count, inputs) for part, count in rows.items()}
    adapters: dict[str, torch.Tensor] = {}
    for number, (part, count) in enumerate(rows.items()):  # of different ranks
        adapters[f"diffusion_model.blocks.0.attn.{part}.{down}"] = torch.randn(rank + number, inputs)
        adapters[f"diffusion_model.blocks.0.attn.{part}.{up}"] = torch.randn(count, rank + number)
    rules = RuleSet("base", RULES.rules[:1])

    def loaded(weights: dict[str, torch.Tensor]) -> tuple[nn.Module, torch.Tensor]:
        linear = Linear("qkv", inputs, [8, 4, 4], kv=4)
        module = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict({"qkv": linear})})])})
        load_weights(module, weights.items(), rules)
        return module, linear.weight.data

    merged = {
        name: tensor + _product(adapters, f"diffusion_model.{name.removesuffix('.weight')}", down, up)
        for name, tensor in base.items()
    }
    module, got = loaded(base)
    for target in (None, Manifest.from_module(module)):
        renamed, changed = remap_lora(adapters, rules, target=target), got.clone()
        for part, rows_there in {"q": slice(0, 8), "k": slice(8, 12), "v": slice(12, 16)}.items():
            changed[rows_there] += _product(renamed, f"layers.0.attn.{part}", down, up)
        assert torch.equal(changed, loaded(merged)[1])


def _product(adapters: dict[str, torch.Tensor], module: str, down: str, up: str) -> torch.Tensor:
    return adapters[f"{module}.{up}"] @ adapters[f"{module}.{down}"]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("blocks.3.attn.qq.lora_A.weight", "remap_unexpected"),
        ("blocks.3.attn.q.weight", "remap_unexpected"),
        ("teacher.blocks.lora_A.weight", "remap_unexpected"),
        ("linear1.lora_A.weight", "remap_op"),
        ("blocks.3.modulation.diff_b", "remap_unexpected"),
    ],
)
def test_what_has_no_place_is_refused(name: str, code: str) -> None:
    with pytest.raises(RemapError) as caught:
        remap_lora({name: 0}, RULES)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        ("lokr_w1", "LoKr"),
        ("lokr_w2_a", "LoKr"),
        ("hada_w1_a", "LoHa"),
        ("lora_mid.weight", "Tucker"),
        ("oft_blocks", "OFT"),
        ("oft_R.default.weight", "OFT"),
        ("a1.weight", "GLoRA"),
        ("on_input", "IA3"),
        ("ia3_l", "IA3"),
        ("lora_E", "AdaLoRA"),
        ("vera_lambda_b", "VeRA"),
        ("lora_embedding_A", "embedding"),
    ],
)
@pytest.mark.parametrize("module", ["blocks.0.ffn.0", "nowhere"])
def test_other_kinds_of_adapters_are_refused_by_their_kind(leaf: str, kind: str, module: str) -> None:
    file = {f"{module}.alpha": torch.tensor(1.0), f"{module}.{leaf}": torch.zeros(2)}
    target = Manifest({"layers.0.ffn.up.weight": ((4, 4), "float32")})
    for known in (None, target):
        with raises("lora_file", kind):
            remap_lora(file, RULES, target=known)


def test_two_adapters_of_one_name_are_refused() -> None:
    names = {"blocks.3.ffn.0.lora_A.weight": 0, "diffusion_model.blocks.3.ffn.0.lora_A.weight": 0}
    with pytest.raises(RemapError) as caught:
        remap_lora(names, RULES)
    assert caught.value.code == "remap_collision"


SHARDS = {"0": ((0, 4), (0, 6)), "1": ((4, 8), (0, 6))}
PARTS = {"gate_up": ["gate", "up"]}


@pytest.mark.parametrize("known", [True, False])
def test_shards_are_named_alike_from_fused_and_from_separate_weights(known: bool) -> None:
    target = Manifest({"x.0.gate_up.weight": TensorSpec((8, 6), "float32", slots=SHARDS)})
    one = Rule(r"b\.(\d+)\.w1\.weight", r"x.\1.gate_up.weight", shard="0")
    other = Rule(r"b\.(\d+)\.w3\.weight", r"x.\1.gate_up.weight", shard="1")
    both = Rule(r"b\.(\d+)\.w13\.weight", r"x.\1.gate_up.weight", shard=("0", "1"), op=Op.of("split", dim=0))
    a, b = torch.randn(2, 6), torch.randn(8, 2)
    lora = {"b.0.w1.lora_A.weight": a, "b.0.w1.lora_B.weight": b[:4]}
    lora |= {"b.0.w3.lora_A.weight": a, "b.0.w3.lora_B.weight": b[4:]}
    separate = remap_lora(lora, RuleSet("r", (one, other)), target=target if known else None, parts=PARTS)
    fused = {"b.0.w13.lora_A.weight": a, "b.0.w13.lora_B.weight": b}
    wanted = remap_lora(fused, RuleSet("r", (both,)), target=target, parts=PARTS)
    assert set(separate) == set(wanted) and "x.0.up.lora_B.weight" in wanted
    assert all(torch.equal(separate[name], wanted[name]) for name in wanted)


def test_parts_of_a_plain_concatenation_are_named_by_their_order() -> None:
    target = Manifest({"x.gate_up.weight": ((8, 6), "float32")})
    join = Op.of("concat", dim=0, parts=("w1", "w3"))
    rules = RuleSet("r", (Rule(r"b\.(w1|w3)\.weight", "x.gate_up.weight", shard=r"\1", op=join),))
    lora = {"b.w3.lora_A.weight": torch.randn(2, 6), "b.w3.lora_B.weight": torch.randn(4, 2)}
    assert set(remap_lora(lora, rules, target=target, parts=PARTS)) == {"x.up.lora_A.weight", "x.up.lora_B.weight"}
    with pytest.raises(RemapError) as caught:
        remap_lora(lora, rules, target=target)
    assert caught.value.code == "remap_op"
    fused = Manifest({"x.gate_up.weight": TensorSpec((8, 6), "float32", slots={"w1": SHARDS["0"], "w3": SHARDS["1"]})})
    assert set(remap_lora(lora, rules, target=fused)) == {"x.w3.lora_A.weight", "x.w3.lora_B.weight"}
    for known, rows, columns in ((target, 4, 5), (fused, 3, 6)):
        wrong = {"b.w3.lora_A.weight": torch.randn(2, columns), "b.w3.lora_B.weight": torch.randn(rows, 2)}
        with pytest.raises(RemapError) as caught:
            remap_lora(wrong, rules, target=known, parts=PARTS)
        assert caught.value.code == "remap_shape"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("places", ["concat", "sizes", "into"])
def test_parts_of_given_sizes_are_known_by_name(fused: bool, places: str) -> None:
    rows = {"q": (0, 8), "k": (8, 10), "v": (10, 12)}
    slots = {part: (span, (0, 6)) for part, span in rows.items()} if fused else {}
    target = Manifest({"a.qkv.weight": TensorSpec((12, 6), "float32", slots=slots)})
    sizes = {"sizes": (8, 2, 2)} if places == "sizes" else {}
    join = Op.of("concat", dim=0, parts=("q", "k", "v"), **sizes)
    if places == "into":
        made = tuple(Rule(rf"s\.{part}\.weight", "a.qkv.weight", into=f"[{a}:{b}]") for part, (a, b) in rows.items())
    else:
        made = (Rule(r"s\.(q|k|v)\.weight", "a.qkv.weight", shard=r"\1", op=join),)
    lora: dict[str, Tensor] = {}
    for rank, (part, (start, stop)) in enumerate(rows.items(), 1):
        lora[f"s.{part}.lora_A.weight"] = torch.randn(rank, 6)
        lora[f"s.{part}.lora_B.weight"] = torch.randn(stop - start, rank)
    arguments: dict = {"target": target, "parts": {"qkv": ["q_proj", "k_proj", "v_proj"]}}
    if places == "into" and not fused:
        with pytest.raises(RemapError) as caught:
            remap_lora(lora, RuleSet("r", made), **arguments)
        assert caught.value.code == "remap_op"
        return
    found = remap_lora(lora, RuleSet("r", made), **arguments)
    assert len(found) == 6
    for name, value in lora.items():
        assert torch.equal(found[name.replace("s.", "a.").replace(".lora", "_proj.lora")], value)
    lora["s.k.lora_B.weight"] = torch.randn(8, 2)
    with pytest.raises(RemapError) as caught:
        remap_lora(lora, RuleSet("r", made), **arguments)
    assert caught.value.code == "remap_shape"


def test_an_adapter_of_no_rank_is_refused() -> None:
    rules = RuleSet("r", (Rule(r"m\.weight", ("q.weight", "k.weight"), op=Op.of("split", dim=0)),))
    target = Manifest({f"{name}.weight": ((4, 6), "float32") for name in "qk"})
    with pytest.raises(RemapError) as caught:
        remap_lora({"m.lora_A.weight": torch.empty(0, 6), "m.lora_B.weight": torch.empty(8, 0)}, rules, target=target)
    assert caught.value.code == "remap_shape"


def test_flat_names_of_two_modules_are_refused() -> None:
    with pytest.raises(RemapError) as caught:
        restore_names({"lora_unet_a_b_c.alpha": 0}, ["a.b_c", "a_b.c"])
    assert caught.value.code == "remap_ambiguous"
    assert list(restore_names({"a.b_c.alpha": 0}, ["a.b_c", "a_b.c"])) == ["a.b_c.alpha"]


def test_names_of_other_trainers_become_those_of_the_base_checkpoint() -> None:
    modules = ["tower.blocks.0.self_attn.q", "tower.blocks.0.ffn.0", "tower.blocks.0.fusion"]
    others = [
        (r"tower\.(blocks\.\d+)\.self_attn\.(q|k)", r"\1.attn1.to_\2"),
        (r"tower\.(blocks\.\d+\.ffn\.0)", r"\1"),
    ]
    names = {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": "tower.blocks.0.self_attn.q.lora_A.weight",
        "lora_unet_blocks_0_attn1_to_q.lora_up.weight": "tower.blocks.0.self_attn.q.lora_up.weight",
        "lora_unet_tower_blocks_0_ffn_0.alpha": "tower.blocks.0.ffn.0.alpha",
        "diffusion_model.blocks.0.ffn.0.lora_B.weight": "tower.blocks.0.ffn.0.lora_B.weight",
        "tower.blocks.0.fusion.lora_A.weight": "tower.blocks.0.fusion.lora_A.weight",
        "blocks.0.fusion.lora_A.weight": "blocks.0.fusion.lora_A.weight",
        "lora_unet_blocks_0_ffn_0.lokr_w1": "tower.blocks.0.ffn.0.lokr_w1",
        "diffusion_model.blocks.7.ffn.0.lora_B.weight": "diffusion_model.blocks.7.ffn.0.lora_B.weight",
    }
    assert restore_names({name: name for name in names}, modules, others) == {new: old for old, new in names.items()}
    with pytest.raises(RemapError) as caught:
        restore_names({"blocks.0.ffn.0.alpha": 0, "tower.blocks.0.ffn.0.alpha": 0}, modules, others)
    assert caught.value.code == "remap_collision"
