"""What Tidepool's model directory is assembled from: one repository, one file."""

from __future__ import annotations

from port_kit.download import FileRule, Recipe, Repository
from tidepool.config import TRANSFORMER_CONFIG

RECIPE = Recipe(
    name="tidepool",
    repositories=(
        Repository(
            "example-org/tidepool",
            licence="Apache-2.0",
            files=(FileRule("tidepool.pth", folder="transformer", name="model.safetensors", convert=True),),
        ),
    ),
    model_index={"_class_name": "TidepoolPipeline", "_diffusers_version": "0.40.0"},
    configs={"transformer": TRANSFORMER_CONFIG},
)
