"""Cases of image models that read the text by cross-attention, or read none."""

from __future__ import annotations

from typing import Any

from port_kit.autoparallel.diffusers_cases.case import Case
from port_kit.autoparallel.diffusers_cases.sizes import Draw, Sizes


def _pixart_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2 * sizes.depth,
        "cross_attention_dim": sizes.hidden,
        "sample_size": 8,
        "patch_size": 2,
        "caption_channels": 24,
    }


def _pixart_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.pixels(4),
        "encoder_hidden_states": draw.texts(24),
        "encoder_attention_mask": draw.mask(draw.text),
        "timestep": draw.times(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sana_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "num_layers": 2 * sizes.depth,
        "num_cross_attention_heads": sizes.heads,
        "cross_attention_head_dim": sizes.head_dim,
        "cross_attention_dim": sizes.hidden,
        "caption_channels": 24,
        "sample_size": 8,
        "patch_size": 1,
        "qk_norm": "rms_norm_across_heads",
    }


def _sana_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.pixels(4, patch=1),
        "encoder_hidden_states": draw.texts(24),
        "encoder_attention_mask": draw.mask(draw.text),
        "timestep": draw.times(),
    }


CASES = {
    "PixArtTransformer2DModel": Case(_pixart_config, _pixart_inputs),
    "SanaTransformer2DModel": Case(_sana_config, _sana_inputs),
}
