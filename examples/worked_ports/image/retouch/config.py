"""Numbers of retouch: full-size configurations, limits of requests, the tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from port_kit.pipeline.prompt_request import PromptOptions
from port_kit.testing.tiny import TinyComponent, TinyPart, read_outline

HERE = Path(__file__).parent
#: ``transformer/config.json``.
TRANSFORMER_CONFIG: Mapping[str, Any] = {
    "z_dim": 8,
    "dim": 64,
    "n_head": 4,
    "depth": 3,
    "ratio": 2,
}
#: ``codec/config.json``.
CODEC_CONFIG: Mapping[str, Any] = {"z_dim": 8, "dim": 32}
#: Bytes of a text; shorter ones are filled up with zeros.
TEXT_LENGTH = 64
#: A latent pixel has ``size_multiple`` pixels along height and width.
OPTIONS = PromptOptions(
    steps=20,
    guidance_scale=4.0,
    height=256,
    width=256,
    size_multiple=4,
    max_side=2048,
    images=1,
)

#: The tiny model: seeded values under the names of the published checkpoints, in their containers.
TINY: Mapping[str, TinyPart] = {
    "transformer": TinyComponent(read_outline(HERE / "transformer.json"), sizes={}),
    "codec": TinyComponent(read_outline(HERE / "codec.json"), sizes={}),
}
