"""Tiny pipelines of images whose text encoders are T5 or CLIP."""

from __future__ import annotations

from typing import Any

from port_kit.autoparallel.tiny_pipelines import parts
from port_kit.autoparallel.tiny_pipelines.case import TinyPipeline

_SIZE = {"height": 32, "width": 32, "num_inference_steps": 3}
_T5 = {**_SIZE, "guidance_scale": 5.0, "max_sequence_length": 24}
_FLOW_VAE: dict[str, Any] = {
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.1,
    "scaling_factor": 1.5,
}
#: Options of the transformers that descend from DiT.
_DIT = {
    "sample_size": 16,
    "num_layers": 2,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "in_channels": 4,
    "out_channels": 8,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_elementwise_affine": False,
}


def _t5(width: int = 32) -> dict[str, Any]:
    return {"text_encoder": parts.t5_encoder(width), "tokenizer": parts.t5_tokenizer()}


def _flux() -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return {
        "transformer": transformer,
        "vae": parts.image_vae(4, **_FLOW_VAE),
        "text_encoder": parts.clip_encoder(),
        "tokenizer": parts.clip_tokenizer(),
        "text_encoder_2": parts.t5_encoder(),
        "tokenizer_2": parts.t5_tokenizer(),
        "scheduler": parts.flow_scheduler(),
    }


def _sd3() -> dict[str, Any]:
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
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
    )
    return {
        "transformer": transformer,
        "vae": parts.image_vae(4, **_FLOW_VAE),
        "text_encoder": parts.clip_encoder(projection=True),
        "tokenizer": parts.clip_tokenizer(),
        "text_encoder_2": parts.clip_encoder(projection=True),
        "tokenizer_2": parts.clip_tokenizer(),
        "text_encoder_3": parts.t5_encoder(64),
        "tokenizer_3": parts.t5_tokenizer(),
        "scheduler": parts.flow_scheduler(),
    }


def _chroma() -> dict[str, Any]:
    from diffusers import ChromaTransformer2DModel

    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return {
        "transformer": transformer,
        "vae": parts.image_vae(4, **_FLOW_VAE),
        **_t5(),
        "scheduler": parts.flow_scheduler(),
    }


def _bria() -> dict[str, Any]:
    from diffusers import BriaTransformer2DModel, EulerDiscreteScheduler

    transformer = BriaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=None,
        axes_dims_rope=(0, 4, 4),
    )
    return {"transformer": transformer, "vae": parts.image_vae(4), **_t5(), "scheduler": EulerDiscreteScheduler()}


def _aura_flow() -> dict[str, Any]:
    from diffusers import AuraFlowTransformer2DModel

    transformer = AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    return {
        "transformer": transformer,
        "vae": parts.image_vae(4),
        "text_encoder": parts.umt5_encoder(),
        "tokenizer": parts.t5_tokenizer(),
        "scheduler": parts.flow_scheduler(),
    }


def _pixart() -> dict[str, Any]:
    from diffusers import DDIMScheduler, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        **_DIT, caption_channels=32, cross_attention_dim=32, norm_type="ada_norm_single", norm_eps=1e-6
    )
    return {"transformer": transformer, "vae": parts.image_vae(4), **_t5(), "scheduler": DDIMScheduler()}


def _cogview3() -> dict[str, Any]:
    from diffusers import CogVideoXDDIMScheduler, CogView3PlusTransformer2DModel

    transformer = CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=16,
        sample_size=16,
    )
    return {"transformer": transformer, "vae": parts.image_vae(4), **_t5(), "scheduler": CogVideoXDDIMScheduler()}


def _dit() -> dict[str, Any]:
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(**_DIT, norm_type="ada_norm_zero")
    return {"transformer": transformer, "vae": parts.image_vae(4), "scheduler": DDIMScheduler()}


CASES = {
    "FluxPipeline": TinyPipeline(_flux, {**_SIZE, "true_cfg_scale": 4.0, "max_sequence_length": 24}),
    "StableDiffusion3Pipeline": TinyPipeline(_sd3, _T5),
    "ChromaPipeline": TinyPipeline(_chroma, _T5),
    "BriaPipeline": TinyPipeline(_bria, {**_T5, "num_inference_steps": 4}),
    "AuraFlowPipeline": TinyPipeline(_aura_flow, _T5),
    "PixArtAlphaPipeline": TinyPipeline(_pixart, _T5, {"use_resolution_binning": False, "clean_caption": False}),
    "PixArtSigmaPipeline": TinyPipeline(_pixart, _T5, {"use_resolution_binning": False, "clean_caption": False}),
    "CogView3PlusPipeline": TinyPipeline(_cogview3, _T5),
    "DiTPipeline": TinyPipeline(
        _dit,
        {"num_inference_steps": 3, "guidance_scale": 4.0},
        {"class_labels": [1]},
        prompt="",
        negative=None,
    ),
}
