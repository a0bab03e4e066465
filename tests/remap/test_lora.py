"""LoRA files follow their base model's rules by name; what cannot follow is refused."""

from __future__ import annotations

import pytest

from port_kit.errors import RemapError
from port_kit.remap import Op, Rule, RuleSet
from port_kit.remap.lora import remap_lora

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
