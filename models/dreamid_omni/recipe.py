"""What a DreamID-Omni model directory is assembled from."""

from __future__ import annotations

from port_kit.download import FileRule, GitCode, Recipe, Repository
from port_kit.models.dreamid_omni.config import AUDIO_LATENT_LENGTH, VIDEO_LATENT_LENGTH
from port_kit.models.wan_fusion.component_configs import (
    AUDIO_VAE_CONFIG,
    TEXT_ENCODER_CONFIG,
    VAE_CONFIG,
    VOCODER_CONFIG,
)
from port_kit.models.wan_fusion.config import TRANSFORMER_CONFIG

# Revisions are left out where they could not be confirmed against the Hub: the first run resolves them and writes
# them into port.lock, and every later run uses what the lock says.
RECIPE = Recipe(
    name="dreamid_omni",
    repositories=(
        Repository(
            "XuGuo699/DreamID-Omni",
            licence="research use only",
            files=(FileRule("dreamid_omni.safetensors", folder="transformer"),),
        ),
        Repository(
            "Wan-AI/Wan2.2-TI2V-5B",
            licence="Apache-2.0",
            files=(
                FileRule(
                    "models_t5_umt5-xxl-enc-bf16.pth", folder="text_encoder", name="model.safetensors", convert=True
                ),
                FileRule("google/umt5-xxl/*", folder="tokenizer"),
                FileRule("Wan2.2_VAE.pth", folder="vae", name="model.safetensors", convert=True),
            ),
        ),
        Repository(
            "hkchengrex/MMAudio",
            licence="CC-BY-NC-4.0",
            files=(
                FileRule("ext_weights/v1-16.pth", folder="audio_vae", name="model.safetensors", convert=True),
                FileRule(
                    "ext_weights/best_netG.pt",
                    folder="vocoder",
                    name="model.safetensors",
                    convert=True,
                    wrapper="generator",
                ),
            ),
        ),
    ),
    model_index={
        "_class_name": "DreamIDOmniPipeline",
        "_diffusers_version": "0.40.0",
        "video_latent_length": VIDEO_LATENT_LENGTH,
        "audio_latent_length": AUDIO_LATENT_LENGTH,
    },
    configs={
        "transformer": TRANSFORMER_CONFIG,
        "text_encoder": TEXT_ENCODER_CONFIG,
        "vae": VAE_CONFIG,
        "audio_vae": AUDIO_VAE_CONFIG,
        "vocoder": VOCODER_CONFIG,
    },
    code=(
        GitCode(
            name="dreamid_omni_reference",
            url="https://github.com/Guoxu1233/DreamID-Omni",
            packages=("dreamid_omni",),
            licence="Apache-2.0",
        ),
    ),
)
