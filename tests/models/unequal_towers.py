"""Towers of unequal width, heads and depth, in the original's JSON, with random checkpoints under original names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from port_kit.models.wan.transformer.config import GATED_CONV_MULTIPLE
from port_kit.testing.tiny import Tensors, expand, fill, scale
from port_kit.testing.tiny_fusion import outline

_SHARED = {"freq_dim": 32, "text_dim": 24, "text_len": 12, "eps": 1e-6}
#: A video tower whose flow has fewer channels than its latents, and an audio tower; heads of 12 in both.
VIDEO = {**_SHARED, "dim": 96, "num_heads": 8, "num_layers": 3, "ffn_dim": 112, "patch_size": [1, 2, 2]}
VIDEO |= {"in_dim": 20, "out_dim": 16}
AUDIO = {**_SHARED, "dim": 48, "num_heads": 4, "num_layers": 2, "ffn_dim": 80, "patch_size": [1]}
AUDIO |= {"in_dim": 10, "out_dim": 10}
#: The same as a pair: blocks are fused one to one, and flows have the shapes of the latents.
FUSION = {
    "video": {**VIDEO, "num_layers": 2, "in_dim": 48, "out_dim": 48},
    "audio": {**AUDIO, "in_dim": 20, "out_dim": 20},
    "rope": {"family": "dreamid_omni", "freqs_scaling": {"num": 31, "den": 157, "dtype": "bfloat16"}},
}


def tower_checkpoint(tower: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return random weights of a tower alone, under Wan's names."""
    return fill(tower_tensors(tower))


def tower_tensors(tower: Mapping[str, Any]) -> Tensors:
    """Return names, shapes and dtypes of a tower alone."""
    named = _published("video_model.", tower).items()
    tensors = {
        name.removeprefix("video_model.").replace("modulation.modulation", "modulation"): spec
        for name, spec in named
        if "fusion" not in name
    }
    patch, (_, dtype) = tower["patch_size"], tensors["patch_embedding.weight"]
    tensors["patch_embedding.weight"] = (tower["dim"], tower["in_dim"], *patch), dtype
    outputs = tower["out_dim"] * (4 if len(patch) == 3 else 1)
    tensors |= {"head.head.weight": ((outputs, tower["dim"]), dtype), "head.head.bias": ((outputs,), dtype)}
    return tensors


def fusion_checkpoint(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return random weights of a pair: projections of the other stream read its width."""
    tensors: Tensors = {}
    for own, other in (("video", "audio"), ("audio", "video")):
        for name, (shape, dtype) in _published(f"{own}_model.", config[own]).items():
            width = config[other]["dim"]
            if "pre_attn_norm_fusion" in name:
                shape = (width,)
            elif name.endswith(("k_fusion.weight", "v_fusion.weight")) and len(shape) == 2:
                shape = (shape[0], width)
            tensors[name] = shape, dtype
    return fill(tensors)


def _published(prefix: str, tower: Mapping[str, Any]) -> Tensors:
    """Return the published tensors of a tower in the sizes and depth of another one."""
    full = {name: spec for name, spec in expand(outline("wan_transformer")).items() if name.startswith(prefix)}
    sizes = {3072: tower["dim"], 14336: tower["ffn_dim"], 4096: tower["text_dim"], 8192: GATED_CONV_MULTIPLE}
    one_layer = scale(full, sizes={**sizes, 256: tower["freq_dim"]}, layers={"blocks": 1})
    layers = range(tower["num_layers"])
    return {name.replace(".blocks.0.", f".blocks.{i}."): spec for i in layers for name, spec in one_layer.items()}
