"""Hub repositories and full-size configurations of the components that the ports share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from port_kit.download import FileRule, Repository
from port_kit.models.wan.components.configs import (
    AUDIO_VAE_CONFIG,
    TEXT_ENCODER_CONFIG,
    VAE_CONFIG,
    VOCODER_CONFIG,
)

#: Repositories without a revision: the first download resolves the revision and writes it to port.lock, which later
#: downloads use.
SHARED_REPOSITORIES = (
    Repository(
        "Wan-AI/Wan2.2-TI2V-5B",
        licence="Apache-2.0",
        files=(
            FileRule("models_t5_umt5-xxl-enc-bf16.pth", folder="text_encoder", name="model.safetensors", convert=True),
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
)


def configs(transformer: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the content of every component's ``config.json`` at full size."""
    return {
        "transformer": transformer,
        "text_encoder": TEXT_ENCODER_CONFIG,
        "vae": VAE_CONFIG,
        "audio_vae": AUDIO_VAE_CONFIG,
        "vocoder": VOCODER_CONFIG,
    }
