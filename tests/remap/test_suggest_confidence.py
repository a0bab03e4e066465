"""Conversions that names and shapes cannot show: no rule for them may be certain, and no plan complete."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from port_kit.manifest import Manifest
from port_kit.remap.plan import check
from port_kit.remap.suggest import Suggestion, suggest

Shape = tuple[int, ...]
Dtypes = Mapping[str, tuple[Shape, str]]
LAYERS = range(3)


def plain(shapes: Mapping[str, Shape], dtype: str = "bfloat16") -> Manifest:
    return Manifest({name: (shape, dtype) for name, shape in shapes.items()})


def in_layers(shapes: Mapping[str, Shape], blocks: str = "blocks") -> dict[str, Shape]:
    return {f"{blocks}.{layer}.{name}": shape for layer in LAYERS for name, shape in shapes.items()}


#: Operation of a conversion -> its tensors, which have equal names on both sides.
SILENT: dict[str, dict[str, Shape]] = {
    "square matrices stored transposed": {"text_projection": (16, 16), "proj.weight": (16, 16)},
    "square matrices of layers": in_layers({"attn.out.weight": (16, 16)}),
    "square stacks of experts": {"experts.down_proj": (4, 16, 16)},
    "square kernels of a convolution": {"conv.weight": (8, 8, 3, 3), "up.weight": (6, 6, 4, 4)},
    "rows of query and key for rotary pairs": in_layers(
        {"attn.q_proj.weight": (16, 12), "attn.k_proj.weight": (8, 12), "attn.q_norm.weight": (4,)}
    ),
    "one layer, so that the query is the only tensor of its size": {
        "layers.0.attn.q_proj.weight": (24, 12),
        "layers.0.attn.k_proj.weight": (8, 12),
    },
    "one layer, biases of query and key": {
        "layers.0.attn.wq.weight": (12, 12),
        "layers.0.attn.wq.bias": (12,),
        "layers.0.ff.weight": (7, 12),
    },
    "rows under a name that says nothing": {"core.wx.weight": (24, 12), "core.wy.weight": (12, 24)},
    "q, k and v interleaved by head": in_layers({"attn.qkv.weight": (48, 16), "attn.qkv.bias": (48,)}),
    "q, k and v interleaved by key head": {"layers.0.attn.query_key_value.weight": (40, 16)},
    "shift and scale of the last modulation": {
        "final_layer.adaLN_modulation.1.weight": (32, 16),
        "final_layer.adaLN_modulation.1.bias": (32,),
    },
    "rows of a modulation table": {"scale_shift_table": (2, 16), "blocks.0.table": (6, 16)},
    "a modulation table stored flat": {
        "out.table": (32,),
        "a.weight": (5, 16),
        "b.weight": (16, 7),
        "c.weight": (16, 3),
    },
    "a nameless table stored flat": {
        "out.params": (32,),
        "a.weight": (5, 16),
        "b.weight": (16, 7),
        "c.weight": (16, 3),
    },
    "gate and up halves": in_layers({"mlp.gate_up_proj.weight": (48, 12), "mlp.down_proj.weight": (12, 24)}),
    "gate and up halves without their names": in_layers(
        {"ff.net.0.proj.weight": (48, 12), "ff.net.2.weight": (12, 24)}
    ),
    "gate and up interleaved in experts": {
        "layers.0.mlp.experts.gate_up_proj": (4, 12, 48),
        "layers.0.mlp.experts.gate_up_proj_bias": (4, 48),
    },
    "experts in another order": {f"mlp.experts.{at}.w2.weight": (12, 24) for at in range(4)},
    "second and third norm": in_layers(
        {"norm2.weight": (12,), "norm2.bias": (12,), "norm3.weight": (12,), "norm3.bias": (12,)}
    ),
    "norms outside of layers": {"norm_in.weight": (12,), "norm_out.weight": (12,), "proj.weight": (12, 5)},
    "a vector of the model's width that is no norm": {"frequencies": (12,)},
    "siblings of one shape": {"txt_in.weight": (12, 9), "img_in.weight": (12, 9)},
    "scale and offset of one norm": {"norm.weight": (12,), "norm.bias": (12,), "a.weight": (12, 5)},
    "levels counted backwards": {f"decoder.up.{level}.conv.weight": (12, 6, 3, 3) for level in LAYERS},
    "layers counted backwards": in_layers({"norm.weight": (12,), "ff.weight": (5, 12)}),
    "columns of patches, channels first or last": {"patch_embed.proj.weight": (12, 48), "patch_embed.proj.bias": (12,)},
    "rows of patches, channels first or last": {"proj_out.weight": (48, 12), "proj_out.bias": (48,)},
    "sine and cosine of a time embedding": {"time_embed.0.weight": (12, 32)},
    "positions of a grid": {"pos_embed": (1, 20, 12)},
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("trap", SILENT)
def test_a_silent_change_is_never_certain(trap: str, prefix: str) -> None:
    """Equal names are no proof, with or without other tensors of the model."""
    around: dict[str, Shape] = {
        "final_norm.weight": (12,),
        "x_in.weight": (12, 3),
        **in_layers({"ff1.weight": (29, 12)}),
    }
    for shapes in (SILENT[trap], SILENT[trap] | around):
        target = plain(shapes)
        suggestion = suggest(target.under(prefix) if prefix else target, target)
        assert not set(certain(suggestion)) & set(SILENT[trap])
        assert all(proposal.doubts for proposal in suggestion.proposals if proposal.confidence == "likely")


#: Names and shapes of scales of a quantized weight ``fc.weight``.
SCALES: dict[str, Shape] = {
    "fc.weight_scale": (),
    "fc.scale_weight": (),
    "fc.weight_scale_inv": (1, 1),
    "fc.scale_inv": (8, 1),
    "fc.input_scale": (),
    "fc.scale": (8,),
    "fc.SCB": (8,),
    "fc.weight.absmax": (2,),
    "fc.qscale": (),
    "fc_scale": (),
}


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "uint8"])
@pytest.mark.parametrize("scale", SCALES)
def test_a_quantized_weight_is_no_match_without_its_scale(scale: str, dtype: str) -> None:
    source = of_layers(
        {"fc.weight": ((8, 16), dtype), scale: (SCALES[scale], "float32"), "fc.bias": ((8,), "bfloat16")}
    )
    target = of_layers({"fc.weight": ((8, 16), "bfloat16"), "fc.bias": ((8,), "bfloat16")})
    suggestion = suggest(source, target)
    assert set(suggestion.missing) == {f"blocks.{layer}.fc.weight" for layer in LAYERS}
    assert {f"blocks.{layer}.{name}" for layer in LAYERS for name in ("fc.weight", scale)} <= set(suggestion.scales)
    assert not certain(suggestion) and not check(suggestion.rules, source, target).ok


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_a_quantized_weight_goes_to_its_like(dtype: str) -> None:
    manifest = of_layers({"fc.weight": ((8, 16), dtype), "fc.weight_scale": ((8,), "float32")})
    suggestion = suggest(manifest, manifest)
    assert check(suggestion.rules, manifest, manifest).ok and not certain(suggestion)
    without_scale = of_layers({"fc.weight": ((8, 16), dtype)})
    assert not check(suggest(manifest, without_scale).rules, manifest, without_scale).ok


def test_a_scale_in_another_place_is_not_dropped() -> None:
    factors = {f"factors.fc{layer}": ((), "float32") for layer in LAYERS}
    source = Manifest({**{f"blocks.{layer}.fc.weight": ((8, 16), "float8_e4m3fn") for layer in LAYERS}, **factors})
    target = of_layers({"fc.weight": ((8, 16), "bfloat16")})
    suggestion = suggest(source, target)
    assert set(suggestion.scales) == set(factors)
    assert all("quantized" in item.doubts[0] for item in suggestion.proposals)
    assert not check(suggestion.rules, source, target).ok


def test_a_scale_of_plain_values_is_not_dropped() -> None:
    source = of_layers({"fc.weight": ((8, 16), "bfloat16"), "fc.weight_scale": ((), "float32")})
    target = of_layers({"fc.weight": ((8, 16), "bfloat16")})
    suggestion = suggest(source, target)
    assert not check(suggestion.rules, source, target).ok
    assert "fc.weight_scale" in suggestion.to_text()


@pytest.mark.parametrize(
    "packed",
    [
        {"fc.qweight": ((16, 16), "int32"), "fc.qzeros": ((1, 16), "int32"), "fc.scales": ((1, 16), "float16")},
        {"fc.qweight": ((16, 16), "int32"), "fc.scales": ((16, 16), "int32"), "fc.g_idx": ((16,), "int32")},
        {
            "fc.weight": ((128, 1), "uint8"),
            "fc.weight.absmax": ((4,), "float32"),
            "fc.weight.quant_map": ((16,), "float32"),
        },
        {"fc.weight": ((16, 16), "uint8"), "fc.weight.quant_state.bitsandbytes__nf4": ((16,), "uint8")},
        {"fc_blocks": ((16, 1, 16), "uint8"), "fc_scales": ((16, 1), "uint8")},
        {"fc.weight": ((16, 8), "float4_e2m1fn_x2"), "fc.weight_scale": ((16, 1), "float8_e8m0fnu")},
    ],
)
def test_packed_weights_are_no_match(packed: Dtypes) -> None:
    target = of_layers({"fc.weight": ((16, 16), "bfloat16")})
    suggestion = suggest(of_layers(packed), target)
    assert set(suggestion.missing) == set(target) and not suggestion.proposals


def test_a_cast_to_float8_without_any_scale_is_doubted() -> None:
    source = Manifest({"m.fc.weight": ((8, 16), "float8_e4m3fn"), "m.norm.weight": ((16,), "bfloat16")})
    target = plain({"fc.weight": (8, 16), "norm.weight": (16,)})
    suggestion = suggest(source, target)
    assert check(suggestion.rules, source, target).ok
    assert all("quantized" in " ".join(item.doubts) for item in suggestion.proposals)


def test_ordinary_modules_beside_a_cast_weight_are_no_scales() -> None:
    shapes = {"proj.weight": (8, 16), "proj.bias": (8,), "proj_out.weight": (16, 8), "proj.lora_A.weight": (2, 16)}
    source, target = plain(shapes, "float8_e4m3fn"), plain(shapes)
    assert not suggest(source, target).missing


def test_integers_are_no_floats() -> None:
    """Positions of tokens have the shape of a table, and counters that of a scale."""
    source = Manifest(
        {"pos": ((1, 9), "int64"), "bn.num_batches_tracked": ((), "int64"), "bn.weight": ((4,), "float32")}
    )
    target = Manifest(
        {"pos": ((1, 9), "float32"), "bn.num_batches_tracked": ((), "int64"), "bn.weight": ((4,), "float32")}
    )
    assert set(suggest(source, target).missing) == {"pos"}


def of_layers(tensors: Dtypes) -> Manifest:
    return Manifest({f"blocks.{layer}.{name}": entry for layer in LAYERS for name, entry in tensors.items()})


def certain(suggestion: Suggestion) -> list[str]:
    return [name for item in suggestion.proposals if item.confidence == "certain" for name in item.targets]
