"""Cases of video models other than Wan and Hunyuan."""

from __future__ import annotations

from typing import Any

import torch

from port_kit.autoparallel.diffusers_cases.case import Case
from port_kit.autoparallel.diffusers_cases.sizes import Draw, Sizes


def _ltx_config(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "cross_attention_dim": sizes.hidden,
        "num_layers": 2 * sizes.depth,
        "caption_channels": 24,
        **more,
    }


def _ltx_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(draw.video, 8),
        "encoder_hidden_states": draw.texts(24),
        "encoder_attention_mask": draw.mask(draw.text),
        "timestep": draw.times(),
        "num_frames": draw.frames,
        "height": draw.rows,
        "width": draw.columns,
    }


def _cogvideox_config(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 32,
        "text_embed_dim": 24,
        "num_layers": 2 * sizes.depth,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "use_rotary_positional_embeddings": True,
        **more,
    }


def _cogvideox_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.clip(4).transpose(1, 2).contiguous(),
        "encoder_hidden_states": draw.texts(24),
        "timestep": draw.times(),
        "image_rotary_emb": draw.rotary(draw.video, draw.sizes.head_dim),
    }


def _ltx2_config(sizes: Sizes) -> dict[str, Any]:
    audio = sizes.hidden // 2
    return {
        **_ltx_config(sizes),
        "audio_in_channels": 6,
        "audio_out_channels": 6,
        "audio_num_attention_heads": sizes.heads,
        "audio_attention_head_dim": sizes.head_dim // 2,
        "audio_cross_attention_dim": audio,
    }


def _ltx2_inputs(draw: Draw) -> dict[str, Any]:
    return {
        **_ltx_inputs(draw),
        "audio_hidden_states": draw.normal(draw.audio, 6),
        "audio_encoder_hidden_states": draw.texts(24),
        "audio_encoder_attention_mask": draw.mask(draw.text),
        "audio_num_frames": draw.audio,
    }


def _consisid_config(sizes: Sizes) -> dict[str, Any]:
    return _cogvideox_config(
        sizes,
        is_train_face=True,
        cross_attn_dim_head=sizes.head_dim,
        cross_attn_num_heads=sizes.heads,
        LFE_id_dim=20,
        LFE_vit_dim=16,
        LFE_depth=2,
        LFE_dim_head=8,
        LFE_num_heads=4,
        LFE_num_id_token=3,
        LFE_num_querie=4,
        LFE_output_dim=int(sizes.hidden / 3 * 2),
        LFE_num_scale=2,
    )


def _consisid_inputs(draw: Draw) -> dict[str, Any]:
    face = {"id_cond": draw.normal(20), "id_vit_hidden": [draw.normal(5, 16) for _ in range(2)]}
    return {**_cogvideox_inputs(draw), **face}


def _allegro_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": 24 * sizes.width,
        "num_layers": 2 * sizes.depth,
        "cross_attention_dim": 24 * sizes.heads * sizes.width,
        "sample_height": 16,
        "sample_width": 16,
        "sample_frames": 4,
        "caption_channels": 24,
    }


def _allegro_inputs(draw: Draw) -> dict[str, Any]:
    """Return inputs with rotary tables per axis: cosines and sines, and the coordinates of the tokens."""
    channels = 8 * draw.sizes.width
    tables = [draw.rotary(count, channels) for count in (draw.frames, draw.rows, draw.columns)]
    positions = draw.grid(draw.frames).unbind(1)
    axes = [(table[0][index], table[1][index]) for table, index in zip(tables, positions, strict=True)]
    grids = tuple(index.unsqueeze(0).repeat(draw.batch, 1) for index in positions)
    return {
        "hidden_states": draw.clip(4),
        "encoder_hidden_states": draw.texts(24),
        "timestep": draw.times(),
        "attention_mask": torch.ones(draw.batch, draw.frames, 2 * draw.rows, 2 * draw.columns),
        "encoder_attention_mask": draw.mask(draw.text),
        "image_rotary_emb": (tuple(axes), grids),
    }


def _latte_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2 * sizes.depth,
        "cross_attention_dim": sizes.hidden,
        "attention_bias": True,
        "sample_size": 8,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "caption_channels": 24,
        "video_length": 3,
    }


def _text_to_video(draw: Draw) -> dict[str, Any]:
    return {"hidden_states": draw.clip(4), "encoder_hidden_states": draw.texts(24), "timestep": draw.times()}


def _mochi_config(sizes: Sizes) -> dict[str, Any]:
    """Return a configuration with heads of 24 channels: two thirds of four times the width are integral."""
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": 24 * sizes.width,
        "num_layers": 3 * sizes.depth,
        "pooled_projection_dim": 20,
        "in_channels": 4,
        "text_embed_dim": 24,
        "time_embed_dim": 32,
        "max_sequence_length": 64,
    }


def _easyanimate_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "num_layers": 3 * sizes.depth,
        "mmdit_layers": 2 * sizes.depth,
        "time_embed_dim": 32,
        "text_embed_dim": 24,
    }


def _cosmos_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "num_layers": 2 * sizes.depth,
        "text_embed_dim": 24,
        "adaln_lora_dim": 12,
        "max_size": (8, 32, 32),
    }


def _cosmos_inputs(draw: Draw) -> dict[str, Any]:
    padding = torch.zeros(1, 1, 2 * draw.rows, 2 * draw.columns)
    mask = draw.mask(draw.text).bool()
    return {**_text_to_video(draw), "attention_mask": mask, "fps": 16, "padding_mask": padding}


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
        "rope_max_seq_len": 32,
    }


def _kandinsky_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "in_text_dim": 24,
        "in_text_dim2": 20,
        "time_dim": 32,
        "model_dim": sizes.hidden,
        "ff_dim": 96 * sizes.width,
        "num_text_blocks": sizes.depth,
        "num_visual_blocks": 2 * sizes.depth,
        "axes_dims": sizes.axes(4, 6, 6),
    }


def _kandinsky_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.clip(4).permute(0, 2, 3, 4, 1).contiguous(),
        "encoder_hidden_states": draw.texts(24),
        "timestep": draw.times(),
        "pooled_projections": draw.normal(20),
        "visual_rope_pos": [torch.arange(count) for count in (draw.frames, draw.rows, draw.columns)],
        "text_rope_pos": torch.arange(draw.text),
    }


def _joy_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads,
        "text_dim": 24,
        "num_layers": 2 * sizes.depth,
        "rope_dim_list": list(sizes.axes(4, 6, 6)),
    }


def _joy_plus_inputs(draw: Draw) -> dict[str, Any]:
    """Return packed patches of a reference image and of an output image of the same size."""
    shape = (1, draw.rows, draw.columns)
    return {
        "hidden_states": draw.normal(2 * draw.image, 4, 1, 2, 2),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.texts(24),
        "encoder_hidden_states_mask": draw.mask(draw.text).float(),
        "shape_list": [[shape, shape]] * draw.batch,
    }


def _temporal_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "in_channels": 32,
        "num_layers": 2 * sizes.depth,
        "norm_num_groups": 8,
    }


def _temporal_inputs(draw: Draw) -> dict[str, Any]:
    """Return frames in the batch dimension; the frames are the tokens, and grow with image steps."""
    frames = draw.columns
    return {"hidden_states": draw.table(draw.batch * frames, 32, 4, 3), "num_frames": frames}


def _cosmos3_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "head_dim": sizes.head_dim,
        "hidden_size": sizes.query_heads * sizes.head_dim,
        "intermediate_size": 96 * sizes.width,
        "latent_channel": 4,
        "patch_latent_dim": 16,
        "num_attention_heads": sizes.query_heads,
        "num_hidden_layers": 2 * sizes.depth,
        "num_key_value_heads": sizes.heads,
        "sound_dim": 6,
        "sound_gen": True,
        "vocab_size": 40,
        "rope_axes_dim": list(sizes.axes(4, 2, 2)),
    }


def _cosmos3_inputs(draw: Draw) -> dict[str, Any]:
    """Return one packed sequence of text, video and audio tokens; the class takes no batch."""
    ends = [draw.text, draw.text + draw.video, draw.text + draw.video + draw.audio]
    video, audio = torch.arange(ends[0], ends[1]), torch.arange(ends[1], ends[2])
    clip = draw.table(1, 4, draw.frames, 2 * draw.rows, 2 * draw.columns)
    return {
        "input_ids": draw.integers(40, draw.text)[0],
        "text_indexes": torch.arange(draw.text),
        "position_ids": torch.arange(ends[2]).repeat(3, 1),
        "und_len": draw.text,
        "sequence_length": ends[2],
        "vision_tokens": [clip],
        "vision_token_shapes": [(draw.frames, draw.rows, draw.columns)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.full((draw.video,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(draw.frames)],
        "sound_tokens": [draw.table(6, draw.audio)],
        "sound_token_shapes": [(draw.audio, 1, 1)],
        "sound_sequence_indexes": audio,
        "sound_mse_loss_indexes": audio,
        "sound_timesteps": torch.full((draw.audio,), 500.0),
        "sound_noisy_frame_indexes": [torch.arange(draw.audio)],
    }


CASES = {
    "AllegroTransformer3DModel": Case(_allegro_config, _allegro_inputs),
    "CogVideoXTransformer3DModel": Case(_cogvideox_config, _cogvideox_inputs),
    "ConsisIDTransformer3DModel": Case(_consisid_config, _consisid_inputs),
    "Cosmos3OmniTransformer": Case(_cosmos3_config, _cosmos3_inputs),
    "CosmosTransformer3DModel": Case(_cosmos_config, _cosmos_inputs),
    "EasyAnimateTransformer3DModel": Case(_easyanimate_config, _text_to_video),
    "JoyImageEditPlusTransformer3DModel": Case(_joy_config, _joy_plus_inputs),
    "JoyImageEditTransformer3DModel": Case(_joy_config, _text_to_video),
    "Kandinsky5Transformer3DModel": Case(_kandinsky_config, _kandinsky_inputs),
    "LatteTransformer3DModel": Case(_latte_config, _text_to_video),
    "LTX2VideoTransformer3DModel": Case(_ltx2_config, _ltx2_inputs),
    "LTXVideoTransformer3DModel": Case(_ltx_config, _ltx_inputs),
    "MochiTransformer3DModel": Case(
        _mochi_config, lambda draw: {**_text_to_video(draw), "encoder_attention_mask": draw.mask(draw.text).bool()}
    ),
    "SanaVideoTransformer3DModel": Case(
        _sana_config, lambda draw: {**_text_to_video(draw), "encoder_attention_mask": draw.mask(draw.text)}
    ),
    "TransformerTemporalModel": Case(_temporal_config, _temporal_inputs),
}
