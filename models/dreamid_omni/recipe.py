"""Recipe of the DreamID-Omni model directory."""

from __future__ import annotations

from port_kit.download import FileRule, GitCode, Recipe, Repository
from port_kit.models.dreamid_omni.config import AUDIO_LATENT_LENGTH, VIDEO_LATENT_LENGTH
from port_kit.models.wan.transformer.config import TRANSFORMER_CONFIG
from port_kit.models.wan.weights.hub_repos import SHARED_REPOSITORIES, configs
from port_kit.parity import OriginalImplementation

RECIPE = Recipe(
    name="dreamid_omni",
    repositories=(
        Repository(
            "XuGuo699/DreamID-Omni",
            licence="research use only",
            files=(FileRule("dreamid_omni.safetensors", folder="transformer"),),
        ),
        *SHARED_REPOSITORIES,
    ),
    model_index={
        "_class_name": "DreamIDOmniPipeline",
        "_diffusers_version": "0.40.0",
        "video_latent_length": VIDEO_LATENT_LENGTH,
        "audio_latent_length": AUDIO_LATENT_LENGTH,
    },
    configs=configs(TRANSFORMER_CONFIG),
    code=(
        GitCode(
            name="dreamid_omni_reference",
            url="https://github.com/Guoxu1233/DreamID-Omni",
            packages=("dreamid_omni",),
            licence="Apache-2.0",
        ),
    ),
)

#: The original implementation, run by ``port-kit verify parity dreamid_omni --reference``.
ORIGINAL = OriginalImplementation(
    git_code="dreamid_omni_reference",
    script="port_kit.models.wan.parity.original_runner",
    options={"family": "dreamid_omni", "package": "dreamid_omni"},
)
