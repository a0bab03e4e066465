"""Cases of video models other than Wan and Hunyuan."""

from __future__ import annotations

from typing import Any

from port_kit.autoparallel.diffusers_cases.case import Case
from port_kit.autoparallel.diffusers_cases.sizes import Draw, Sizes


def _ltx_config(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "cross_attention_dim": sizes.hidden,
        "num_layers": 2 * sizes.depth,
        "caption_channels": 24,
        **more,
    }


def _ltx_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(draw.video, 8),
        "encoder_hidden_states": draw.texts(24),
        "encoder_attention_mask": draw.mask(draw.text),
        "timestep": draw.times(),
        "num_frames": draw.frames,
        "height": draw.rows,
        "width": draw.columns,
    }


def _cogvideox_config(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 32,
        "text_embed_dim": 24,
        "num_layers": 2 * sizes.depth,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "use_rotary_positional_embeddings": True,
        **more,
    }


def _cogvideox_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.clip(4).transpose(1, 2).contiguous(),
        "encoder_hidden_states": draw.texts(24),
        "timestep": draw.times(),
        "image_rotary_emb": draw.rotary(draw.video, draw.sizes.head_dim),
    }


CASES = {
    "CogVideoXTransformer3DModel": Case(_cogvideox_config, _cogvideox_inputs),
    "LTXVideoTransformer3DModel": Case(_ltx_config, _ltx_inputs),
}
