"""Cases of image models that read the text by cross-attention, or read none."""

from __future__ import annotations

from typing import Any

import torch

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


def _dit_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "in_channels": 4,
        "num_layers": 2 * sizes.depth,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    }


def _dit_inputs(draw: Draw) -> dict[str, Any]:
    return {"hidden_states": draw.square(4), "timestep": draw.times(), "class_labels": draw.integers(10)}


def _lumina_config(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": sizes.query_heads * sizes.head_dim,
        "num_layers": 2 * sizes.depth,
        "num_attention_heads": sizes.query_heads,
        "num_kv_heads": sizes.heads,
        "multiple_of": 32,
        **more,
    }


def _lumina2_config(sizes: Sizes) -> dict[str, Any]:
    axes = {"axes_dim_rope": sizes.axes(4, 6, 6), "axes_lens": (32, 32, 32)}
    return _lumina_config(sizes, num_refiner_layers=sizes.depth, cap_feat_dim=24, **axes)


def _lumina2_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.pixels(4),
        "timestep": draw.times(1.0),
        "encoder_hidden_states": draw.texts(24),
        "encoder_attention_mask": draw.mask(draw.text).bool(),
    }


def _lumina_next_inputs(draw: Draw) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return {
        "hidden_states": draw.pixels(4),
        "timestep": draw.times(1.0),
        "encoder_hidden_states": draw.texts(24),
        "encoder_mask": draw.mask(draw.text),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(draw.sizes.head_dim, 16, 16),
        "cross_attention_kwargs": {},
    }


def _omnigen_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "intermediate_size": 96 * sizes.width,
        "num_layers": 2 * sizes.depth,
        "pad_token_id": 0,
        "vocab_size": 40,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 256,
        "rope_scaling": {"long_factor": [1.0] * (8 * sizes.width), "short_factor": [1.0] * (8 * sizes.width)},
        "pos_embed_max_size": 16,
        "time_step_dim": 32,
    }


def _omnigen_inputs(draw: Draw) -> dict[str, Any]:
    """Return a prompt that contains an input image of 16 tokens, and the latents of the output image."""
    text = 17 + draw.text
    total = text + 1 + draw.image
    mask = torch.ones(draw.batch, total, total, dtype=torch.long)
    mask[:, :text, :text] = torch.ones(text, text, dtype=torch.long).tril()
    if draw.masked:
        mask[:, text:, text - draw.text // 2 : text] = 0
    return {
        "hidden_states": draw.pixels(4),
        "timestep": draw.times(1.0),
        "input_ids": 1 + draw.integers(39, text),
        "input_img_latents": [draw.table(1, 4, 8, 8) for _ in range(draw.batch)],
        "input_image_sizes": {row: [[0, 16]] for row in range(draw.batch)},
        "attention_mask": mask,
        "position_ids": torch.arange(total).repeat(draw.batch, 1),
    }


def _zimage_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "dim": sizes.hidden,
        "n_layers": 2 * sizes.depth,
        "n_refiner_layers": sizes.depth,
        "n_heads": sizes.heads,
        "n_kv_heads": sizes.heads,
        "cap_feat_dim": 24,
        "axes_dims": list(sizes.axes(4, 6, 6)),
        "axes_lens": [256, 64, 64],
    }


def _zimage_inputs(draw: Draw) -> dict[str, Any]:
    """Return lists of images and texts, which the class pads to multiples of 32 tokens."""
    steps, text = draw.columns - 5, 32 * ((draw.text - 7) // 3) + 40
    lengths = [text - (32 if draw.masked and row else 0) for row in range(draw.batch)]
    return {
        "x": list(draw.normal(4, 1, 2 * 8, 2 * (3 + 4 * steps))),
        "t": draw.times(1.0),
        "cap_feats": [draw.table(length, 24) for length in lengths],
    }


def _unet_config(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "in_channels": 32,
        "num_layers": 2 * sizes.depth,
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        **more,
    }


def _unet_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.pixels(32, patch=1),
        "encoder_hidden_states": draw.texts(24),
        "encoder_attention_mask": draw.mask(draw.text),
    }


def _prior_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "num_layers": 2 * sizes.depth,
        "embedding_dim": 20,
        "num_embeddings": 7,
    }


def _prior_inputs(draw: Draw) -> dict[str, Any]:
    """Return inputs with a fixed number of text tokens, which the class has positions for."""
    return {
        "hidden_states": draw.normal(20),
        "timestep": draw.times(),
        "proj_embedding": draw.normal(20),
        "encoder_hidden_states": draw.normal(7, 20),
        "attention_mask": draw.mask(7).bool(),
    }


CASES = {
    "DiTTransformer2DModel": Case(_dit_config, _dit_inputs),
    "DreamLiteTransformer2DModel": Case(
        lambda sizes: _unet_config(sizes, qk_norm="rms_norm", num_kv_heads=sizes.heads), _unet_inputs
    ),
    "Lumina2Transformer2DModel": Case(_lumina2_config, _lumina2_inputs),
    "LuminaNextDiT2DModel": Case(lambda sizes: _lumina_config(sizes, cross_attention_dim=24), _lumina_next_inputs),
    "OmniGenTransformer2DModel": Case(_omnigen_config, _omnigen_inputs),
    "PixArtTransformer2DModel": Case(_pixart_config, _pixart_inputs),
    "PriorTransformer": Case(_prior_config, _prior_inputs),
    "SanaTransformer2DModel": Case(_sana_config, _sana_inputs),
    "Transformer2DModel": Case(lambda sizes: _unet_config(sizes, use_linear_projection=True), _unet_inputs),
    "ZImageTransformer2DModel": Case(_zimage_config, _zimage_inputs),
}
