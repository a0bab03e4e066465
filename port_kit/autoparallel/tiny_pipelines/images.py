"""Tiny pipelines of images."""

from __future__ import annotations

from typing import Any

from port_kit.autoparallel.tiny_pipelines import parts
from port_kit.autoparallel.tiny_pipelines.case import TinyPipeline

_SIZE = {"height": 32, "width": 32, "num_inference_steps": 3}


def _flux() -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel

    return {
        "transformer": FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
        "vae": parts.image_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.5),
        "text_encoder": parts.clip_encoder(),
        "tokenizer": parts.clip_tokenizer(),
        "text_encoder_2": parts.t5_encoder(),
        "tokenizer_2": parts.t5_tokenizer(),
        "scheduler": parts.flow_scheduler(),
    }


def _sd3() -> dict[str, Any]:
    from diffusers import SD3Transformer2DModel

    return {
        "transformer": SD3Transformer2DModel(
            sample_size=32,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            out_channels=4,
        ),
        "vae": parts.image_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=1.5),
        "text_encoder": parts.clip_encoder(projection=True),
        "tokenizer": parts.clip_tokenizer(),
        "text_encoder_2": parts.clip_encoder(projection=True),
        "tokenizer_2": parts.clip_tokenizer(),
        "text_encoder_3": parts.t5_encoder(64),
        "tokenizer_3": parts.t5_tokenizer(),
        "scheduler": parts.flow_scheduler(),
    }


CASES = {
    "FluxPipeline": TinyPipeline(_flux, {**_SIZE, "true_cfg_scale": 4.0, "max_sequence_length": 24}),
    "StableDiffusion3Pipeline": TinyPipeline(_sd3, {**_SIZE, "guidance_scale": 5.0, "max_sequence_length": 24}),
}
