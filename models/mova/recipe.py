"""Recipes of MOVA model directories, one per published checkpoint.

Each checkpoint is one repository in the layout of diffusers, with classes and folders of its own. Folders get the names
of vLLM-Omni; all files keep theirs, with the published ``config.json`` of each component.
"""

from __future__ import annotations

from port_kit.download import FileRule, GitCode, Recipe, Repository
from port_kit.models.mova.config import BOUNDARY_RATIO, VARIANTS

#: Folders of a repository, and their names in the model directory.
FOLDERS = {
    "video_dit": "transformer",
    "video_dit_2": "transformer_2",
    "audio_dit": "audio_transformer",
    "dual_tower_bridge": "bridge",
    "text_encoder": "text_encoder",
    "tokenizer": "tokenizer",
    "video_vae": "vae",
    "audio_vae": "audio_vae",
    "scheduler": "scheduler",
}


def recipe(variant: str) -> Recipe:
    """Return the recipe of one of :data:`~port_kit.models.mova.config.VARIANTS`."""
    height, width = VARIANTS[variant]
    return Recipe(
        name="mova",
        repositories=(
            Repository(
                f"OpenMOSS-Team/MOVA-{variant}",
                licence="Apache-2.0",
                files=tuple(FileRule(f"{source}/*", folder=target) for source, target in FOLDERS.items()),
            ),
        ),
        model_index={
            "_class_name": "MOVAPipeline",
            "_diffusers_version": "0.40.0",
            "boundary_ratio": BOUNDARY_RATIO,
            "height": height,
            "width": width,
        },
        code=(
            GitCode(
                name="mova_reference",
                url="https://github.com/OpenMOSS/MOVA",
                packages=("mova",),
                licence="Apache-2.0",
            ),
        ),
    )


RECIPE = recipe("720p")
RECIPE_360P = recipe("360p")
