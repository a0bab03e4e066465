"""Tiny pipelines of videos."""

from __future__ import annotations

from typing import Any

from port_kit.autoparallel.tiny_pipelines import parts
from port_kit.autoparallel.tiny_pipelines.case import TinyPipeline

_SIZE = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 5.0}


def wan_vae() -> Any:
    """Return the VAE of Wan, which scales by 8 in space and 4 in time."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def _wan() -> dict[str, Any]:
    from diffusers import WanTransformer3DModel

    return {
        "transformer": WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ),
        "vae": wan_vae(),
        "text_encoder": parts.umt5_encoder(),
        "tokenizer": parts.t5_tokenizer(),
        "scheduler": parts.flow_scheduler(shift=3.0),
    }


CASES = {
    "WanPipeline": TinyPipeline(_wan, {**_SIZE, "max_sequence_length": 16}),
}
