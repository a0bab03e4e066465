"""Cases of audio models, and of MiniMax's model of video and audio."""

from __future__ import annotations

from typing import Any

import torch

from port_kit.autoparallel.diffusers_cases.case import Case
from port_kit.autoparallel.diffusers_cases.sizes import Draw, Sizes


def _ace_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.query_heads * sizes.head_dim,
        "intermediate_size": 96 * sizes.width,
        "num_hidden_layers": 2 * sizes.depth,
        "num_attention_heads": sizes.query_heads,
        "num_key_value_heads": sizes.heads,
        "head_dim": sizes.head_dim,
        "in_channels": 14,
        "audio_acoustic_hidden_dim": 6,
        "sliding_window": 3,
        "encoder_hidden_size": 24,
    }


def _ace_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(2 * draw.audio, 6),
        "context_latents": draw.normal(2 * draw.audio, 8),
        "timestep": draw.times(1.0),
        "timestep_r": draw.times(0.5),
        "encoder_hidden_states": draw.texts(24),
    }


def _stable_audio_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "sample_size": 64,
        "in_channels": 4,
        "num_layers": 2 * sizes.depth,
        "attention_head_dim": sizes.head_dim,
        "num_attention_heads": sizes.query_heads,
        "num_key_value_attention_heads": sizes.heads,
        "out_channels": 4,
        "cross_attention_dim": sizes.hidden,
        "time_proj_dim": 12,
        "global_states_input_dim": 20,
        "cross_attention_input_dim": 24,
    }


def _stable_audio_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(4, draw.audio),
        "timestep": draw.times(1.0),
        "encoder_hidden_states": draw.texts(24),
        "global_hidden_states": draw.normal(1, 20),
        "rotary_embedding": draw.rotary(draw.audio + 1, draw.sizes.head_dim // 2),
    }


def _stable_audio3_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "io_channels": 6,
        "embed_dim": sizes.hidden,
        "depth": 2 * sizes.depth,
        "num_heads": sizes.heads,
        "cond_token_dim": 24,
        "global_cond_dim": 20,
        "local_add_cond_dim": 5,
        "timestep_features_dim": 32,
        "num_memory_tokens": 3,
    }


def _stable_audio3_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(6, draw.audio),
        "timestep": draw.times(1.0),
        "encoder_hidden_states": draw.texts(24),
        "global_hidden_states": draw.normal(20),
        "encoder_attention_mask": draw.mask(draw.text),
        "local_add_cond": draw.normal(5, draw.audio),
    }


def _longcat_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "dit_dim": sizes.hidden,
        "dit_depth": 2 * sizes.depth,
        "dit_heads": sizes.heads,
        "dit_text_dim": 24,
        "latent_dim": 6,
    }


def _longcat_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(draw.audio, 6),
        "latent_cond": draw.normal(draw.audio, 6),
        "encoder_hidden_states": draw.texts(24),
        "encoder_attention_mask": draw.mask(draw.text).bool(),
        "timestep": draw.times(1.0),
    }


def _music3_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "in_channels": 6,
        "condition_dim": 24,
        "num_layers": 2 * sizes.depth,
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "ff_inner_dim": 96 * sizes.width,
        "rotary_dim": sizes.head_dim // 2,
        "fourier_embedding_dim": 32,
    }


def _music3_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(6, draw.audio),
        "timestep": draw.times(1.0),
        "encoder_hidden_states": draw.normal(draw.audio, 24),
    }


def _depth_decoder_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.hidden,
        "num_layers": 2 * sizes.depth,
        "num_attention_heads": sizes.heads,
        "intermediate_size": 96 * sizes.width,
        "audio_vocab_size": 20,
        "num_codebooks": 3,
        "max_position_embeddings": 64,
    }


def _film_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "input_dims": 12,
        "targets_length": 64,
        "d_model": sizes.hidden,
        "num_layers": 2 * sizes.depth,
        "num_heads": sizes.heads,
        "d_kv": sizes.head_dim,
        "d_ff": 96 * sizes.width,
    }


def _film_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "encodings_and_masks": [(draw.texts(draw.sizes.hidden), draw.mask(draw.text))],
        "decoder_input_tokens": draw.normal(draw.audio, 12),
        "decoder_noise_time": draw.times(1.0),
    }


def _h3_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "hidden_size": 80 * sizes.width,
        "num_layers": 2 * sizes.depth,
        "num_refiner_layers": sizes.depth,
        "ffn_dim": 96 * sizes.width,
        "in_channels": 3,
        "audio_in_channels": 6,
        "text_dim": 24,
        "freq_dim": 32,
        "time_embed_hidden_dim": 40,
        "time_embed_dim": 36,
        "rope_freq_dim": 2 * sizes.width,
    }


def _h3_inputs(draw: Draw) -> dict[str, Any]:
    """Return one packed sequence of text, audio and video tokens; audio has a timestep of its own."""
    text, audio = torch.arange(draw.text), draw.text + torch.arange(draw.audio)
    video = draw.text + draw.audio + torch.arange(draw.video)
    tags = torch.tensor([1] * draw.text + [2] * draw.audio + [0] * draw.video)
    return {
        "hidden_states": draw.normal(draw.video, 12),
        "audio_hidden_states": draw.normal(draw.audio, 6),
        "encoder_hidden_states": draw.texts(24),
        "timestep": torch.tensor([700.0, 300.0]),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": torch.arange(len(tags)).unsqueeze(1).repeat(1, 3).float(),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


CASES = {
    "AceStepTransformer1DModel": Case(_ace_config, _ace_inputs),
    "LongCatAudioDiTTransformer": Case(_longcat_config, _longcat_inputs),
    "MiniMaxH3Transformer3DModel": Case(_h3_config, _h3_inputs),
    "MiniMaxMusic3RVQDepthDecoder": Case(
        _depth_decoder_config, lambda draw: {"inputs_embeds": draw.normal(draw.audio, draw.sizes.hidden)}
    ),
    "MiniMaxMusic3Transformer1DModel": Case(_music3_config, _music3_inputs),
    "StableAudio3DiTModel": Case(_stable_audio3_config, _stable_audio3_inputs),
    "StableAudioDiTModel": Case(_stable_audio_config, _stable_audio_inputs),
    "T5FilmDecoder": Case(_film_config, _film_inputs),
}
