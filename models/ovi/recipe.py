"""Recipes of Ovi model directories, one per published checkpoint."""

from __future__ import annotations

from port_kit.download import FileRule, GitCode, Recipe, Repository
from port_kit.models.ovi.config import SKIP_BLOCK, VARIANTS
from port_kit.models.wan.transformer.config import OVI_TRANSFORMER_CONFIG
from port_kit.models.wan.weights.hub_repos import SHARED_REPOSITORIES, configs
from port_kit.parity import OriginalImplementation


def recipe(variant: str) -> Recipe:
    """Return the recipe of one of :data:`~port_kit.models.ovi.config.VARIANTS`."""
    given = VARIANTS[variant]
    return Recipe(
        name="ovi",
        repositories=(
            Repository(
                "chetwinlow1/Ovi",
                licence="Apache-2.0",
                files=(FileRule(given.file, folder="transformer", name="model.safetensors"),),
            ),
            *SHARED_REPOSITORIES,
        ),
        model_index={
            "_class_name": "OviPipeline",
            "_diffusers_version": "0.40.0",
            "variant": variant,
            "video_latent_length": given.lengths.video,
            "audio_latent_length": given.lengths.audio,
            "video_area": given.video_area,
            "audio_prompt": given.audio_prompt,
            "skip_block": SKIP_BLOCK,
        },
        configs=configs(OVI_TRANSFORMER_CONFIG),
        code=(
            GitCode(
                name="ovi_reference",
                url="https://github.com/character-ai/Ovi",
                packages=("ovi",),
                licence="Apache-2.0",
            ),
        ),
    )


RECIPE = recipe("720x720_5s")
RECIPE_960_5S = recipe("960x960_5s")
RECIPE_960_10S = recipe("960x960_10s")

#: The original implementation, run by ``port-kit verify parity ovi --reference``.
ORIGINAL = OriginalImplementation(
    git_code="ovi_reference",
    script="port_kit.models.wan.parity.original_runner",
    options={"family": "ovi", "package": "ovi"},
)
