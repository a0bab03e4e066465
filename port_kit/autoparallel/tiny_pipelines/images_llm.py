"""Tiny pipelines of images whose text encoders are language models."""

from __future__ import annotations

from typing import Any

from port_kit.autoparallel.tiny_pipelines import parts, parts_llm
from port_kit.autoparallel.tiny_pipelines.case import TinyPipeline

_SIZE = {"height": 32, "width": 32, "num_inference_steps": 3}
_GUIDED = {**_SIZE, "guidance_scale": 5.0, "max_sequence_length": 32}


def _qwen_image() -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": parts_llm.qwen_vl_encoder(),
        "tokenizer": parts_llm.qwen_tokenizer(),
        "scheduler": parts.flow_scheduler(),
    }


def _lumina2() -> dict[str, Any]:
    from diffusers import Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=4,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 64, 64),
        cap_feat_dim=16,
    )
    return {
        "transformer": transformer,
        "vae": parts.image_vae(4, shift_factor=0.1),
        "text_encoder": parts_llm.gemma2_encoder(),
        "tokenizer": parts_llm.gemma_tokenizer(),
        "scheduler": parts.flow_scheduler(),
    }


def _sana() -> dict[str, Any]:
    from diffusers import AutoencoderDC, SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=32,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": parts_llm.gemma2_encoder(),
        "tokenizer": parts_llm.gemma_tokenizer(),
        "scheduler": parts.flow_scheduler(),
    }


def _cogview4() -> dict[str, Any]:
    from diffusers import CogView4Transformer2DModel

    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )
    return {
        "transformer": transformer,
        "vae": parts.image_vae(4),
        "text_encoder": parts_llm.glm_encoder(),
        "tokenizer": parts_llm.llama_tokenizer(),
        "scheduler": parts.flow_scheduler(base_shift=0.25, max_shift=0.75, base_image_seq_len=256),
    }


def _z_image() -> dict[str, Any]:
    from diffusers import ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return {
        "transformer": transformer,
        "vae": parts.image_vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        "text_encoder": parts_llm.qwen3_encoder(),
        "tokenizer": parts_llm.qwen_tokenizer(),
        "scheduler": parts.flow_scheduler(),
    }


def _ovis() -> dict[str, Any]:
    from diffusers import OvisImageTransformer2DModel

    transformer = OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return {
        "transformer": transformer,
        "vae": parts.image_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        "text_encoder": parts_llm.qwen3_encoder(),
        "tokenizer": parts_llm.qwen_tokenizer(),
        "scheduler": parts.flow_scheduler(),
    }


CASES = {
    "QwenImagePipeline": TinyPipeline(_qwen_image, {**_SIZE, "true_cfg_scale": 4.0, "max_sequence_length": 32}),
    "Lumina2Pipeline": TinyPipeline(_lumina2, _GUIDED),
    "SanaPipeline": TinyPipeline(_sana, _GUIDED, {"use_resolution_binning": False, "complex_human_instruction": None}),
    "CogView4Pipeline": TinyPipeline(_cogview4, _GUIDED),
    "ZImagePipeline": TinyPipeline(_z_image, _GUIDED),
    "OvisImagePipeline": TinyPipeline(_ovis, _GUIDED),
}
