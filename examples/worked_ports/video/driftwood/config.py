"""Numbers of driftwood: full-size configurations, limits of requests, the tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from port_kit.pipeline.prompt_request import PromptOptions
from port_kit.testing.tiny import TinyComponent, TinyPart, read_outline

HERE = Path(__file__).parent
#: ``transformer/config.json``.
TRANSFORMER_CONFIG: Mapping[str, Any] = {
    "channels": 8,
    "width": 64,
    "heads": 4,
    "stages": 3,
    "inner": 128,
}
#: ``projector/config.json``.
PROJECTOR_CONFIG: Mapping[str, Any] = {"channels": 8, "inner": 32}
#: Bytes of a text; shorter ones are filled up with zeros.
TEXT_LENGTH = 64
#: Frames per second.
FPS = 16
#: A latent voxel has ``size_multiple`` pixels along height and width, and ``frame_step`` frames after the first.
OPTIONS = PromptOptions(
    steps=20,
    guidance_scale=4.0,
    height=256,
    width=256,
    size_multiple=8,
    max_side=2048,
    frames=17,
    frame_step=1,
)

#: The tiny model: seeded values under the names of the published checkpoints, in their containers.
TINY: Mapping[str, TinyPart] = {
    "transformer": TinyComponent(read_outline(HERE / "transformer.json"), sizes={}),
    "projector": TinyComponent(read_outline(HERE / "projector.json"), sizes={}),
}
