"""Cases of image models whose attention is joint: image and text tokens are queries and keys."""

from __future__ import annotations

from typing import Any

from port_kit.autoparallel.diffusers_cases.case import Case
from port_kit.autoparallel.diffusers_cases.sizes import Draw, Sizes


def _sd3_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3 * sizes.depth,
        "attention_head_dim": sizes.head_dim,
        "num_attention_heads": sizes.heads,
        "joint_attention_dim": 24,
        "caption_projection_dim": sizes.hidden,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }


def _sd3_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.pixels(4),
        "encoder_hidden_states": draw.texts(24),
        "pooled_projections": draw.normal(20),
        "timestep": draw.times(),
    }


def _qwen_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "in_channels": 12,
        "out_channels": 3,
        "num_layers": 2 * sizes.depth,
        "attention_head_dim": sizes.head_dim,
        "num_attention_heads": sizes.heads,
        "joint_attention_dim": 24,
        "axes_dims_rope": sizes.axes(4, 6, 6),
    }


def _qwen_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(draw.image, 12),
        "encoder_hidden_states": draw.texts(24),
        "encoder_hidden_states_mask": draw.mask(draw.text),
        "timestep": draw.times(1.0),
        "img_shapes": [[(1, draw.rows, draw.columns)]] * draw.batch,
    }


CASES = {
    "QwenImageTransformer2DModel": Case(_qwen_config, _qwen_inputs),
    "SD3Transformer2DModel": Case(_sd3_config, _sd3_inputs),
}
