"""Full-size configurations of MOVA's components, and defaults and limits of its requests.

The configurations are those that third parties read from the published files, with Wan's values where nobody stated
one. A model directory has the published ``config.json`` files; these constants only describe the full size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from port_kit.models.wan.components.configs import TEXT_ENCODER_CONFIG as UMT5_XXL
from port_kit.pipeline.prompt_request import PromptOptions

FPS = 24  # frames per second; the only rate of the published examples
SAMPLE_RATE = 48_000  # Hz
BOUNDARY_RATIO = 0.9  # of the noise; below it, the second video tower runs
MAX_TEXT_TOKENS = 512

#: Published checkpoints, by the name of their repository, with the size of their examples (height, width).
VARIANTS: Mapping[str, tuple[int, int]] = {"360p": (352, 640), "720p": (720, 1280)}

#: The default of the original's script.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指"
)

#: Defaults and limits of requests; a model directory sets the default size.
OPTIONS = PromptOptions(
    steps=50,
    guidance_scale=5.0,
    height=720,
    width=1280,
    size_multiple=16,
    max_area=2 * 720 * 1280,
    frames=193,
    frame_step=4,
    max_frames=2 * 192 + 1,
    negative_prompt=NEGATIVE_PROMPT,
    seed=42,
    images=1,
    size_of_image=False,
)

#: Options of a tower of which only one value is supported: the published one.
TOWER_OPTIONS: Mapping[str, Any] = {
    "has_image_input": False,
    "has_image_pos_emb": False,
    "has_ref_conv": False,
    "add_control_adapter": False,
    "seperated_timestep": False,
    "require_clip_embedding": False,
    "fuse_vae_embedding_in_latents": False,
}
_TOWER = {**TOWER_OPTIONS, "text_dim": 4096, "freq_dim": 256, "eps": 1e-6}

#: Both video towers. 36 input channels: 16 of the latents, 4 of the mask, 16 of the condition.
TRANSFORMER_CONFIG: Mapping[str, Any] = {
    **_TOWER,
    "dim": 5120,
    "ffn_dim": 13824,
    "num_heads": 40,
    "num_layers": 40,
    "patch_size": [1, 2, 2],
    "in_dim": 36,
    "out_dim": 16,
    "require_vae_embedding": True,
}

AUDIO_TRANSFORMER_CONFIG: Mapping[str, Any] = {
    **_TOWER,
    "dim": 1536,
    "ffn_dim": 8960,
    "num_heads": 12,
    "num_layers": 30,
    "patch_size": [1],
    "in_dim": 128,
    "out_dim": 128,
    "require_vae_embedding": False,
    "vae_type": "dac",
}

BRIDGE_CONFIG: Mapping[str, Any] = {
    "visual_layers": 40,
    "audio_layers": 30,
    "visual_hidden_dim": 5120,
    "audio_hidden_dim": 1536,
    "head_dim": 128,
    "audio_fps": 50.0,
    "interaction_strategy": "full",
    "apply_cross_rope": True,
    "apply_first_frame_bias_in_rope": False,
    "trainable_condition_scale": False,
    "pooled_adaln": False,
}

TEXT_ENCODER_CONFIG: Mapping[str, Any] = UMT5_XXL

#: Wan 2.1's VAE: 8 x 8 pixels and 4 frames per latent.
VAE_CONFIG: Mapping[str, Any] = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ],
}

AUDIO_VAE_CONFIG: Mapping[str, Any] = {
    "latent_dim": 128,
    "decoder_dim": 2048,
    "decoder_rates": [8, 5, 4, 3, 2],
    "sample_rate": 48_000,
    "continuous": True,
    "use_weight_norm": False,
}
