"""Cases of Wan and the classes derived from it: video self-attention, then cross-attention to a text."""

from __future__ import annotations

from typing import Any

import torch

from port_kit.autoparallel.diffusers_cases.case import Case
from port_kit.autoparallel.diffusers_cases.sizes import Draw, Sizes


def _config(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 96 * sizes.width,
        "num_layers": 2 * sizes.depth,
        "rope_max_seq_len": 32,
        **more,
    }


def _inputs(draw: Draw, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": draw.clip(4),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.texts(24),
        **more,
    }


def _animate_config(sizes: Sizes) -> dict[str, Any]:
    """Return a configuration without image tokens: the class takes all but 512 tokens of a text for those."""
    return _config(
        sizes,
        in_channels=12,
        latent_channels=4,
        image_dim=None,
        motion_encoder_channel_sizes={"4": 8, "8": 8},
        motion_encoder_size=8,
        motion_style_dim=12,
        motion_dim=6,
        motion_encoder_dim=10,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=3,
        inject_face_latents_blocks=2,
    )


def _animate_inputs(draw: Draw) -> dict[str, Any]:
    pose, faces = draw.clip(4)[:, :, 1:].contiguous(), draw.normal(3, 8, 8, 8)
    return _inputs(draw, hidden_states=draw.clip(12), pose_hidden_states=pose, face_pixel_values=faces)


def _animate2_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "text_len": 16,
        "in_dim": 8,
        "dim": sizes.hidden,
        "ffn_dim": 96 * sizes.width,
        "freq_dim": 32,
        "text_dim": 24,
        "out_dim": 4,
        "num_heads": sizes.heads,
        "num_layers": 2 * sizes.depth,
        "use_img_emb": False,
    }


def _animate2_inputs(draw: Draw) -> dict[str, Any]:
    """Return inputs of the reference step, which fills the cache of keys and values."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    grid = torch.tensor([[draw.frames, draw.rows, draw.columns]] * draw.batch)
    return {
        "hidden_states": list(draw.clip(4)),
        "condition_latents": list(draw.clip(4)),
        "timestep": draw.times(),
        "encoder_hidden_states": list(draw.texts(24)),
        "kv_cache": WanAnimate2KVCache(2 * draw.sizes.depth),
        "kv_cache_mode": "extract",
        "seq_len": draw.video,
        "offset_grid_sizes": grid,
        "reference_grid_sizes": grid,
    }


def _anyflow_inputs(draw: Draw, **more: Any) -> dict[str, Any]:
    times = draw.times().unsqueeze(1).repeat(1, draw.frames)
    clip = draw.clip(4).transpose(1, 2).contiguous()
    return _inputs(draw, hidden_states=clip, timestep=times, r_timestep=times / 2, **more)


def _helios_config(sizes: Sizes) -> dict[str, Any]:
    config = _config(sizes, rope_dim=sizes.axes(4, 6, 6))
    del config["rope_max_seq_len"]
    return config


def _helios_inputs(draw: Draw) -> dict[str, Any]:
    frames = torch.arange(10).repeat(draw.batch, 1)
    history = {"long": frames[:, :4], "mid": frames[:, 4:6], "short": frames[:, 6:7]}
    latents = {
        f"latents_history_{term}": draw.normal(4, index.shape[1], 2 * draw.rows, 2 * draw.columns)
        for term, index in history.items()
    }
    indices = {f"indices_latents_history_{term}": index for term, index in history.items()}
    return _inputs(draw, indices_hidden_states=frames[:, 7:], **indices, **latents)


def _vace_inputs(draw: Draw) -> dict[str, Any]:
    return _inputs(draw, control_hidden_states=draw.clip(6))


CASES = {
    "AnyFlowFARTransformer3DModel": Case(
        lambda sizes: _config(sizes, chunk_partition=(1, 2)), lambda draw: _anyflow_inputs(draw, chunk_partition=[1, 2])
    ),
    "AnyFlowTransformer3DModel": Case(_config, _anyflow_inputs),
    "ChronoEditTransformer3DModel": Case(_config, _inputs),
    "HeliosTransformer3DModel": Case(_helios_config, _helios_inputs),
    "SkyReelsV2Transformer3DModel": Case(_config, _inputs),
    "WanAnimate2Transformer3DModel": Case(_animate2_config, _animate2_inputs),
    "WanAnimateTransformer3DModel": Case(_animate_config, _animate_inputs),
    "WanTransformer3DModel": Case(_config, _inputs),
    "WanVACETransformer3DModel": Case(
        lambda sizes: _config(sizes, vace_layers=list(range(0, 2 * sizes.depth, 2)), vace_in_channels=6), _vace_inputs
    ),
}
