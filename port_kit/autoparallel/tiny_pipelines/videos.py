"""Tiny pipelines of videos and of audio."""

from __future__ import annotations

from typing import Any

from port_kit.autoparallel.tiny_pipelines import parts, parts_llm
from port_kit.autoparallel.tiny_pipelines.case import TinyPipeline

_SIZE = {
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "num_inference_steps": 3,
    "guidance_scale": 5.0,
    "max_sequence_length": 16,
}


def _t5(width: int = 32) -> dict[str, Any]:
    return {"text_encoder": parts.t5_encoder(width), "tokenizer": parts.t5_tokenizer()}


def _wan_parts() -> dict[str, Any]:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return {"vae": vae, "text_encoder": parts.umt5_encoder(), "tokenizer": parts.t5_tokenizer()}


_WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def _wan() -> dict[str, Any]:
    from diffusers import WanTransformer3DModel

    return {"transformer": WanTransformer3DModel(**_WAN), **_wan_parts(), "scheduler": parts.flow_scheduler(shift=3.0)}


def _wan_image() -> dict[str, Any]:
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

    return {
        "transformer": WanTransformer3DModel(**{**_WAN, "in_channels": 36}),
        "transformer_2": WanTransformer3DModel(**{**_WAN, "in_channels": 36}),
        "boundary_ratio": 0.8,
        **_wan_parts(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }


def _skyreels() -> dict[str, Any]:
    from diffusers import SkyReelsV2Transformer3DModel, UniPCMultistepScheduler

    return {
        "transformer": SkyReelsV2Transformer3DModel(**_WAN),
        **_wan_parts(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
    }


def _ltx() -> dict[str, Any]:
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1, 1, 1, 1),
        patch_size=1,
        patch_size_t=1,
    )
    return {"transformer": transformer, "vae": vae, **_t5(), "scheduler": parts.flow_scheduler()}


def _cogvideox() -> dict[str, Any]:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return {"transformer": transformer, "vae": vae, **_t5(), "scheduler": CogVideoXDDIMScheduler()}


def _mochi() -> dict[str, Any]:
    from diffusers import AutoencoderKLMochi, MochiTransformer3DModel

    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=None,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    vae = AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return {"transformer": transformer, "vae": vae, **_t5(), "scheduler": parts.flow_scheduler()}


def _latte() -> dict[str, Any]:
    from diffusers import DDIMScheduler, LatteTransformer3DModel

    transformer = LatteTransformer3DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=2,
    )
    return {"transformer": transformer, "vae": parts.image_vae(4), **_t5(), "scheduler": DDIMScheduler()}


def _hunyuan() -> dict[str, Any]:
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=32,
        rope_axes_dim=(2, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": parts_llm.llama_encoder(),
        "tokenizer": parts_llm.llama_tokenizer(),
        "text_encoder_2": parts.clip_encoder(),
        "tokenizer_2": parts.clip_tokenizer(),
        "scheduler": parts.flow_scheduler(shift=7.0),
    }


def _stable_audio() -> dict[str, Any]:
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioProjectionModel,
    )

    transformer = StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    return {
        "transformer": transformer,
        "vae": vae,
        **_t5(32),
        "projection_model": StableAudioProjectionModel(
            text_encoder_dim=32, conditioning_dim=8, min_value=0, max_value=32
        ),
        "scheduler": EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    }


CASES = {
    "WanPipeline": TinyPipeline(_wan, _SIZE),
    "WanImageToVideoPipeline": TinyPipeline(_wan_image, _SIZE, image=(40, 48)),
    "SkyReelsV2Pipeline": TinyPipeline(_skyreels, _SIZE),
    "LTXPipeline": TinyPipeline(_ltx, _SIZE),
    "CogVideoXPipeline": TinyPipeline(_cogvideox, _SIZE),
    "MochiPipeline": TinyPipeline(_mochi, {**_SIZE, "num_frames": 7}),
    "LattePipeline": TinyPipeline(
        _latte,
        {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 5.0},
        {"video_length": 2, "clean_caption": False},
    ),
    "HunyuanVideoPipeline": TinyPipeline(
        _hunyuan,
        {**_SIZE, "true_cfg_scale": 4.0, "guidance_scale": 1.0},
        {"prompt_template": {"template": "{}", "crop_start": 0}},
    ),
    "StableAudioPipeline": TinyPipeline(_stable_audio, {"num_inference_steps": 3, "guidance_scale": 5.0}),
}
