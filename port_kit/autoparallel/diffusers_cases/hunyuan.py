"""Cases of the Hunyuan classes and those derived from them."""

from __future__ import annotations

from typing import Any

import torch

from port_kit.autoparallel.diffusers_cases.case import Case
from port_kit.autoparallel.diffusers_cases.sizes import Draw, Sizes


def _video_config(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "num_layers": 2 * sizes.depth,
        "num_single_layers": 2 * sizes.depth,
        "num_refiner_layers": sizes.depth,
        "text_embed_dim": 24,
        "pooled_projection_dim": 20,
        "rope_axes_dim": sizes.axes(4, 6, 6),
        **more,
    }


def _video_inputs(draw: Draw, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": draw.clip(4),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.texts(24),
        "encoder_attention_mask": draw.mask(draw.text),
        "pooled_projections": draw.normal(20),
        "guidance": torch.full((draw.batch,), 6000.0),
        **more,
    }


CASES = {
    "HunyuanVideoTransformer3DModel": Case(_video_config, _video_inputs),
}
