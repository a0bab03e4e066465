"""Cases of image models whose attention is joint: image and text tokens are queries and keys."""

from __future__ import annotations

from typing import Any

import torch

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


def _aura_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "sample_size": 8,
        "in_channels": 4,
        "num_mmdit_layers": 2 * sizes.depth,
        "num_single_dit_layers": 2 * sizes.depth,
        "attention_head_dim": sizes.head_dim,
        "num_attention_heads": sizes.heads,
        "joint_attention_dim": 24,
        "caption_projection_dim": sizes.hidden,
        "pos_embed_max_size": 256,
    }


def _image_and_text(draw: Draw) -> dict[str, Any]:
    return {"hidden_states": draw.pixels(4), "encoder_hidden_states": draw.texts(24), "timestep": draw.times()}


def _hidream_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2 * sizes.depth,
        "num_single_layers": 2 * sizes.depth,
        "attention_head_dim": sizes.head_dim,
        "num_attention_heads": sizes.heads,
        "caption_channels": [24, 20],
        "text_emb_dim": 18,
        "axes_dims_rope": sizes.axes(8, 4, 4),
        "max_resolution": (32, 32),
        "llama_layers": list(range(4 * sizes.depth)),
    }


def _hidream_inputs(draw: Draw) -> dict[str, Any]:
    """Return inputs with a square image: the class pads others to its largest size."""
    layers = 4 * draw.sizes.depth
    return {
        "hidden_states": draw.square(4),
        "timesteps": draw.times(),
        "encoder_hidden_states_t5": draw.texts(24),
        "encoder_hidden_states_llama3": draw.table(layers, draw.batch, draw.text, 20),
        "pooled_embeds": draw.normal(18),
    }


def _cogview_config(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2 * sizes.depth,
        "attention_head_dim": sizes.head_dim,
        "num_attention_heads": sizes.heads,
        "text_embed_dim": 24,
        "time_embed_dim": 32,
        "condition_dim": 12,
        **more,
    }


def _cogview_inputs(draw: Draw, **more: Any) -> dict[str, Any]:
    size = torch.tensor([[64.0, 80.0]] * draw.batch)
    sizes = {"original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size)}
    return {**_image_and_text(draw), **sizes, **more}


def _glm_inputs(draw: Draw) -> dict[str, Any]:
    inputs = _cogview_inputs(draw)
    del inputs["original_size"]
    drop = torch.zeros(draw.batch, draw.image, dtype=torch.bool)
    return {**inputs, "prior_token_id": draw.integers(30, draw.image), "prior_token_drop": drop}


def _krea_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "in_channels": 12,
        "num_layers": 2 * sizes.depth,
        "attention_head_dim": sizes.head_dim,
        "num_attention_heads": sizes.query_heads,
        "num_key_value_heads": sizes.heads,
        "intermediate_size": 96 * sizes.width,
        "timestep_embed_dim": 32,
        "text_hidden_dim": 24,
        "num_text_layers": 3,
        "text_num_attention_heads": 4,
        "text_num_key_value_heads": 4,
        "text_intermediate_size": 40,
        "num_layerwise_text_blocks": sizes.depth,
        "num_refiner_text_blocks": sizes.depth,
        "axes_dims_rope": sizes.axes(4, 6, 6),
    }


def _krea_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(draw.image, 12),
        "encoder_hidden_states": draw.normal(draw.text, 3, 24),
        "encoder_attention_mask": draw.mask(draw.text).bool(),
        "timestep": draw.times(1.0),
        "position_ids": torch.cat([torch.zeros(draw.text, 3, dtype=torch.long), draw.grid()]),
    }


def _nucleus_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "in_channels": 12,
        "out_channels": 3,
        "num_layers": 2 * sizes.depth,
        "attention_head_dim": sizes.head_dim,
        "num_attention_heads": sizes.query_heads,
        "num_key_value_heads": sizes.heads,
        "joint_attention_dim": 24,
        "axes_dims_rope": sizes.axes(4, 6, 6),
        "dense_moe_strategy": "leave_first_block_dense",
        "num_experts": 4,
        "moe_intermediate_dim": 48 * sizes.width,
        "capacity_factors": 2.0,
    }


def _prx_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "context_in_dim": 24,
        "hidden_size": sizes.hidden,
        "num_heads": sizes.heads,
        "depth": 2 * sizes.depth,
        "axes_dim": list(sizes.axes(8, 8)),
    }


def _ideogram_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "in_channels": 12,
        "num_layers": 2 * sizes.depth,
        "attention_head_dim": sizes.head_dim,
        "num_attention_heads": sizes.heads,
        "intermediate_size": 96 * sizes.width,
        "adaln_dim": 32,
        "llm_features_dim": 24,
        "mrope_section": sizes.axes(4, 2, 2),
    }


def _ideogram_inputs(draw: Draw) -> dict[str, Any]:
    """Return packed inputs: text tokens, then image tokens; masked text tokens are segments of their own."""
    total = draw.text + draw.image
    text = torch.arange(draw.text).unsqueeze(1).repeat(1, 3)
    segments = torch.cat([draw.mask(draw.text), torch.ones(draw.batch, draw.image, dtype=torch.long)], dim=1)
    indicator = torch.tensor([3] * draw.text + [2] * draw.image)
    return {
        "hidden_states": draw.normal(total, 12),
        "encoder_hidden_states": draw.normal(total, 24),
        "timestep": draw.times(1.0),
        "position_ids": torch.cat([text, draw.grid() + draw.text]).repeat(draw.batch, 1, 1),
        "segment_ids": segments,
        "indicator": indicator.repeat(draw.batch, 1),
    }


def _ernie_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads,
        "num_layers": 2 * sizes.depth,
        "ffn_hidden_size": 96 * sizes.width,
        "in_channels": 12,
        "out_channels": 12,
        "text_in_dim": 24,
        "rope_axes_dim": sizes.axes(4, 6, 6),
    }


def _ernie_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.pixels(12, patch=1),
        "timestep": draw.times(),
        "text_bth": draw.texts(24),
        "text_lens": draw.mask(draw.text).sum(1),
    }


CASES = {
    "AuraFlowTransformer2DModel": Case(_aura_config, _image_and_text),
    "CogView3PlusTransformer2DModel": Case(
        lambda sizes: _cogview_config(sizes, pos_embed_max_size=16, sample_size=8), _cogview_inputs
    ),
    "CogView4Transformer2DModel": Case(lambda sizes: _cogview_config(sizes, rope_axes_dim=(16, 16)), _cogview_inputs),
    "ErnieImageTransformer2DModel": Case(_ernie_config, _ernie_inputs),
    "GlmImageTransformer2DModel": Case(
        lambda sizes: _cogview_config(sizes, prior_vq_quantizer_codebook_size=30), _glm_inputs
    ),
    "HiDreamImageTransformer2DModel": Case(_hidream_config, _hidream_inputs),
    "Ideogram4Transformer2DModel": Case(_ideogram_config, _ideogram_inputs),
    "Krea2Transformer2DModel": Case(_krea_config, _krea_inputs),
    "NucleusMoEImageTransformer2DModel": Case(_nucleus_config, _qwen_inputs),
    "PRXTransformer2DModel": Case(
        _prx_config, lambda draw: {**_image_and_text(draw), "attention_mask": draw.mask(draw.text).bool()}
    ),
    "QwenImageTransformer2DModel": Case(_qwen_config, _qwen_inputs),
    "SD3Transformer2DModel": Case(_sd3_config, _sd3_inputs),
}
