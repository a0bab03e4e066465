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


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def _video15_config(sizes: Sizes) -> dict[str, Any]:
    config = _without(_video_config(sizes), "num_single_layers", "pooled_projection_dim")
    return {**config, "patch_size": 2, "text_embed_2_dim": 20, "image_embed_dim": 18}


def _video15_inputs(draw: Draw) -> dict[str, Any]:
    inputs = _without(_video_inputs(draw), "pooled_projections", "guidance")
    second = {"encoder_hidden_states_2": draw.normal(5, 20), "encoder_attention_mask_2": draw.mask(5)}
    return {**inputs, **second, "image_embeds": draw.normal(4, 18)}


def _framepack_config(sizes: Sizes) -> dict[str, Any]:
    return _video_config(sizes, has_image_proj=True, image_proj_dim=18, has_clean_x_embedder=True)


def _framepack_inputs(draw: Draw) -> dict[str, Any]:
    frames = torch.arange(9)
    return _video_inputs(
        draw,
        image_embeds=draw.normal(4, 18),
        indices_latents=frames[6:],
        latents_clean=draw.clip(4)[:, :, :2],
        indices_latents_clean=frames[:2],
        latents_history_2x=draw.clip(4)[:, :, :2],
        indices_latents_history_2x=frames[2:4],
        latents_history_4x=draw.normal(4, 4, 2 * draw.rows, 2 * draw.columns),
        indices_latents_history_4x=frames[2:6],
    )


def _image_config(sizes: Sizes) -> dict[str, Any]:
    config = _without(_video_config(sizes), "pooled_projection_dim")
    return {**config, "patch_size": (1, 1), "rope_axes_dim": sizes.axes(8, 8), "text_embed_2_dim": 20}


def _image_inputs(draw: Draw) -> dict[str, Any]:
    inputs = _without(_video_inputs(draw), "pooled_projections", "guidance")
    second = {"encoder_hidden_states_2": draw.normal(5, 20), "encoder_attention_mask_2": draw.mask(5)}
    return {**inputs, **second, "hidden_states": draw.pixels(4, patch=1)}


def _dit_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": sizes.hidden,
        "num_layers": 4 * sizes.depth,
        "cross_attention_dim": 24,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 20,
        "text_len": 7,
        "text_len_t5": 5,
    }


def _dit_inputs(draw: Draw) -> dict[str, Any]:
    """Return inputs with a fixed number of text tokens, which the class has a parameter for."""
    return {
        "hidden_states": draw.pixels(4),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.normal(7, 24),
        "text_embedding_mask": draw.mask(7),
        "encoder_hidden_states_t5": draw.normal(5, 16),
        "text_embedding_mask_t5": draw.mask(5),
        "image_meta_size": torch.tensor([[64.0, 80.0, 64.0, 80.0, 0.0, 0.0]] * draw.batch),
        "style": torch.zeros(draw.batch, dtype=torch.long),
        "image_rotary_emb": draw.rotary(draw.image, draw.sizes.head_dim),
    }


def _motif_config(sizes: Sizes) -> dict[str, Any]:
    config = _without(_video_config(sizes), "num_refiner_layers", "pooled_projection_dim")
    return {**config, "num_single_layers": 3 * sizes.depth, "num_decoder_layers": 1, "image_embed_dim": 18}


def _motif_inputs(draw: Draw) -> dict[str, Any]:
    inputs = _without(_video_inputs(draw), "pooled_projections", "guidance")
    return {**inputs, "image_embeds": draw.normal(4, 18)}


CASES = {
    "HunyuanDiT2DModel": Case(_dit_config, _dit_inputs),
    "HunyuanImageTransformer2DModel": Case(_image_config, _image_inputs),
    "HunyuanVideo15Transformer3DModel": Case(_video15_config, _video15_inputs),
    "HunyuanVideoFramepackTransformer3DModel": Case(_framepack_config, _framepack_inputs),
    "HunyuanVideoTransformer3DModel": Case(_video_config, _video_inputs),
    "MotifVideoTransformer3DModel": Case(_motif_config, _motif_inputs),
}
