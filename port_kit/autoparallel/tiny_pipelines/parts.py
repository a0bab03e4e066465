"""Tiny text encoders, tokenizers and VAEs, built from configurations. No file is fetched."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from port_kit.testing.tokenizer import write_tokenizer

#: Entries of the vocabularies.
T5_WORDS = 512
#: Printable characters without the space, the tokens of the byte-pair tokenizers.
_CHARACTERS = [chr(code) for code in range(33, 127)]


def t5_tokenizer() -> Any:
    """Return a tokenizer of T5 and UMT5."""
    from transformers import T5TokenizerFast

    with tempfile.TemporaryDirectory(prefix="port-kit-") as folder:
        write_tokenizer(Path(folder), size=T5_WORDS)
        return T5TokenizerFast.from_pretrained(folder, model_max_length=64)


def t5_encoder(width: int = 32) -> Any:
    """Return a T5 encoder with two layers."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=T5_WORDS, d_model=width, d_kv=8, num_heads=4, d_ff=37, num_layers=2, initializer_factor=1.0)
    )


def umt5_encoder(width: int = 32) -> Any:
    """Return a UMT5 encoder with two layers."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(vocab_size=T5_WORDS, d_model=width, d_kv=8, num_heads=4, d_ff=37, num_layers=2))


def clip_tokenizer(length: int = 77) -> Any:
    """Return a tokenizer of CLIP without merges."""
    from transformers import CLIPTokenizer

    tokens = [*_CHARACTERS, *(f"{c}</w>" for c in _CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def clip_encoder(width: int = 32, *, projection: bool = False) -> Any:
    """Return CLIP's text encoder with two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=2 * len(_CHARACTERS) + 2,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        bos_token_id=2 * len(_CHARACTERS),
        eos_token_id=2 * len(_CHARACTERS) + 1,
        pad_token_id=2 * len(_CHARACTERS) + 1,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def image_vae(channels: int = 4, *, blocks: int = 2, **more: Any) -> Any:
    """Return a VAE of images that scales by ``2**(blocks - 1)``."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        **more,
    )


def flow_scheduler(**options: Any) -> Any:
    """Return the scheduler of flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)
