"""LoRA files follow their base model's rules by name; what cannot follow is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from port_kit.errors import RemapError
from port_kit.remap import Op, Rule, RuleSet, load_weights
from port_kit.remap.lora import remap_lora
from port_kit.remap.mapper import stacked_params_mapping
from tests.remap.linears import Linear

RULES = RuleSet(
    "base",
    (
        Rule(r"blocks\.(\d+)\.attn\.(q|k|v)\.(weight|bias)", r"layers.\1.attn.qkv.\3", shard=r"\2"),
        Rule(r"blocks\.(\d+)\.ffn\.0\.(weight|bias)", r"layers.\1.ffn.up.\2"),
        Rule(r"linear1\.weight", ("a.weight", "b.weight"), op=Op.of("split", dim=0)),
        Rule(r"teacher\.(.*)", drop="only for training"),
    ),
)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "base_model.model."])
def test_names_follow_the_base_model(prefix: str) -> None:
    source = {
        f"{prefix}blocks.3.attn.q.lora_A.weight": 1,
        f"{prefix}blocks.3.attn.q.lora_B.weight": 2,
        f"{prefix}blocks.3.attn.k.lora_A.default.weight": 3,
        f"{prefix}blocks.0.ffn.0.lora_down.weight": 4,
        f"{prefix}blocks.0.ffn.0.alpha": 5,
    }
    assert remap_lora(source, RULES) == {
        "layers.3.attn.q.lora_A.weight": 1,
        "layers.3.attn.q.lora_B.weight": 2,
        "layers.3.attn.k.lora_A.default.weight": 3,
        "layers.0.ffn.up.lora_down.weight": 4,
        "layers.0.ffn.up.alpha": 5,
    }


@pytest.mark.parametrize("form", ["lora_A.weight lora_B.weight", "lora_down.weight lora_up.weight"])
def test_adapters_of_fused_projections_act_on_their_rows(form: str) -> None:
    """Merging a LoRA before the load, or into the loaded rows by its new names and slots, gives the same weights."""
    inputs, rows, rank = 6, {"q": 8, "k": 4, "v": 4}, 2
    down, up = form.split()
    base = {f"blocks.0.attn.{part}.weight": torch.randn(count, inputs) for part, count in rows.items()}
    adapters: dict[str, torch.Tensor] = {}
    for part, count in rows.items():
        adapters[f"diffusion_model.blocks.0.attn.{part}.{down}"] = torch.randn(rank, inputs)
        adapters[f"diffusion_model.blocks.0.attn.{part}.{up}"] = torch.randn(count, rank)
    rules = RuleSet("base", RULES.rules[:1])

    def loaded(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        linear = Linear("qkv", inputs, [8, 4, 4], kv=4)
        module = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict({"qkv": linear})})])})
        load_weights(module, weights.items(), rules)
        return linear.weight.data

    merged = {
        name: tensor + _product(adapters, f"diffusion_model.{name.removesuffix('.weight')}", down, up)
        for name, tensor in base.items()
    }
    expected, got = loaded(merged), loaded(base).clone()
    renamed = remap_lora(adapters, rules)
    slots = {".q": slice(0, 8), ".k": slice(8, 12), ".v": slice(12, 16)}
    stacked = stacked_params_mapping(rules, base)
    assert [slot for _, _, slot in stacked] == list(rows)
    for fused, own, _ in stacked:
        assert fused == ".qkv"
        got[slots[own]] += _product(renamed, f"layers.0.attn{own}", down, up)
    assert torch.equal(got, expected)


def _product(adapters: dict[str, torch.Tensor], module: str, down: str, up: str) -> torch.Tensor:
    return adapters[f"{module}.{up}"] @ adapters[f"{module}.{down}"]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("blocks.3.attn.qq.lora_A.weight", "remap_unexpected"),
        ("blocks.3.attn.q.weight", "remap_unexpected"),
        ("teacher.blocks.lora_A.weight", "remap_unexpected"),
        ("linear1.lora_A.weight", "remap_op"),
    ],
)
def test_what_cannot_follow_is_refused(name: str, code: str) -> None:
    with pytest.raises(RemapError) as caught:
        remap_lora({name: 0}, RULES)
    assert caught.value.code == code


def test_two_adapters_of_one_name_are_refused() -> None:
    names = {"blocks.3.ffn.0.lora_A.weight": 0, "diffusion_model.blocks.3.ffn.0.lora_A.weight": 0}
    with pytest.raises(RemapError, match="both layers.3.ffn.up"):
        remap_lora(names, RULES)
