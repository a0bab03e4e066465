"""Configurations of the components that DreamID-Omni and Ovi share, at full size and at other sizes.

Each mapping is the content of the component's ``config.json``. The full-size mappings describe the published
checkpoints: widths follow from tensor shapes, the rest are constructor defaults of the original implementation.

* ``text_encoder``: transformers' ``UMT5Config`` of ``models_t5_umt5-xxl-enc-bf16.pth``;
* ``vae``: diffusers' ``AutoencoderKLWan`` of ``Wan2.2_VAE.pth``;
* ``audio_vae``: MMAudio's 16 kHz mel autoencoder, ``v1-16.pth``;
* ``vocoder``: NVIDIA's BigVGAN for 16 kHz, ``best_netG.pt`` (the model's keys of ``bigvgan_vocoder.yml``).

The functions convert the sizes that a goldens folder records, under the original's names, to these mappings. Recipes
use this module, so it imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from port_kit.errors import ParityError
from port_kit.escape import quoted

#: Mean of each latent channel of Wan 2.2's VAE, from the original's wrapper class; the checkpoint does not hold it.
WAN_2_2_LATENT_MEAN: tuple[float, ...] = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
    *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
    *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)

#: Standard deviation of each latent channel of Wan 2.2's VAE, from the same class.
WAN_2_2_LATENT_STD: tuple[float, ...] = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
    *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
    *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)

#: umt5-xxl: 24 layers, 64 heads of 64, gated tanh-GELU; 256384 rows in the vocabulary, more than the tokenizer uses.
TEXT_ENCODER_CONFIG: Mapping[str, Any] = {
    "model_type": "umt5",
    "architectures": ["UMT5EncoderModel"],
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "is_encoder_decoder": False,
}

#: Wan 2.2's VAE: 16 x 16 pixels and 4 frames per latent; pixels are folded 2 x 2 into 12 channels before the encoder.
VAE_CONFIG: Mapping[str, Any] = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    "latents_mean": list(WAN_2_2_LATENT_MEAN),
    "latents_std": list(WAN_2_2_LATENT_STD),
}

#: MMAudio 16 kHz: 80 mel bands in, 20 latent channels out.
AUDIO_VAE_CONFIG: Mapping[str, Any] = {"data_dim": 80, "embed_dim": 20, "hidden_dim": 384}

#: BigVGAN 16 kHz: 4*4*2*2*2*2 = 256 samples per mel frame.
VOCODER_CONFIG: Mapping[str, Any] = {
    "num_mels": 80,
    "upsample_initial_channel": 1536,
    "upsample_rates": [4, 4, 2, 2, 2, 2],
    "upsample_kernel_sizes": [8, 8, 4, 4, 4, 4],
    "resblock": "1",
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "activation": "snakebeta",
    "snake_logscale": True,
}


def text_encoder_config(dims: Mapping[str, Any], *, vocab_size: int | None = None) -> dict[str, Any]:
    """Translate the T5 sizes of the original implementation.

    Args:
        dims: ``dim``, ``dim_attn``, ``dim_ffn``, ``num_heads``, ``encoder_layers``, ``num_buckets`` and optionally
            ``vocab_size``, as in ``SET.json`` under ``t5`` or in a goldens folder's ``umt5/config.json``.
        vocab_size: rows of the token embedding if ``dims`` has no ``vocab_size``.

    Raises:
        ParityError: a size is missing, or the layers share one relative bias (T5, not UMT5).
    """
    if dims.get("shared_pos", False):
        raise ParityError(
            "the sizes say shared_pos=true; UMT5 has one relative bias per layer",
            code="goldens_invalid",
            hint="use sizes of a UMT5 encoder",
        )
    vocabulary = dims.get("vocab_size", vocab_size)
    if vocabulary is None:
        raise _missing("vocab_size", dims)
    heads = int(_need(dims, "num_heads"))
    return {
        **TEXT_ENCODER_CONFIG,
        "vocab_size": int(vocabulary),
        "d_model": _need(dims, "dim"),
        "d_kv": int(_need(dims, "dim_attn")) // heads,
        "d_ff": _need(dims, "dim_ffn"),
        "num_layers": _need(dims, "encoder_layers"),
        "num_heads": heads,
        "relative_attention_num_buckets": dims.get("num_buckets", 32),
    }


def vae_config(dims: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the original's Wan VAE sizes (``SET.json`` under ``vae``: ``dim``, ``dec_dim``, ``z_dim`` ...).

    Latent mean and standard deviation are the published ones, as in the original's wrapper, so ``z_dim`` must be
    their length.

    Raises:
        ParityError: a size is missing, or ``z_dim`` is not 48.
    """
    z_dim = int(_need(dims, "z_dim"))
    if z_dim != len(WAN_2_2_LATENT_MEAN):
        raise ParityError(
            f"z_dim is {z_dim}; expected {len(WAN_2_2_LATENT_MEAN)}, the number of latent statistics of Wan 2.2",
            code="goldens_invalid",
            hint="record the goldens with z_dim 48",
        )
    optional = ("dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", "dropout")
    config = {
        **VAE_CONFIG,
        "base_dim": _need(dims, "dim"),
        "decoder_base_dim": dims.get("dec_dim", dims["dim"]),
        "z_dim": z_dim,
        **{key: dims[key] for key in optional if key in dims},
    }
    halvings = len(config["dim_mult"]) - 1  # in space, after pixels are folded into channels
    return {
        **config,
        "scale_factor_spatial": config["patch_size"] * 2**halvings,
        "scale_factor_temporal": 2 ** sum(config["temperal_downsample"]),
    }


def audio_vae_config(dims: Mapping[str, Any]) -> dict[str, Any]:
    """Return MMAudio's sizes (``SET.json`` under ``mmvae``), whose names are those of this component."""
    return {key: _need(dims, key) for key in AUDIO_VAE_CONFIG}


def vocoder_config(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generator's options of a BigVGAN ``.yml``, without those for training; defaults are full-size."""
    kept = (*VOCODER_CONFIG, "use_tanh_at_final", "use_bias_at_final")
    return {**VOCODER_CONFIG, **{key: hyperparameters[key] for key in kept if key in hyperparameters}}


def _need(dims: Mapping[str, Any], key: str) -> int:
    if key not in dims:
        raise _missing(key, dims)
    return int(dims[key])


def _missing(key: str, dims: Mapping[str, Any]) -> ParityError:
    return ParityError(
        f"the sizes lack {quoted(key)}; found {', '.join(dims) or 'none'}",
        code="goldens_invalid",
        hint="see docs/goldens.md for the sizes that a goldens folder records",
    )
