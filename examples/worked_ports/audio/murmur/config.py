"""Numbers of murmur: full-size configurations, limits of requests, the tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from port_kit.pipeline.prompt_request import PromptOptions
from port_kit.testing.tiny import TinyComponent, TinyPart, read_outline

HERE = Path(__file__).parent
#: ``transformer/config.json``.
TRANSFORMER_CONFIG: Mapping[str, Any] = {
    "latent": 12,
    "d": 64,
    "heads": 4,
    "inner": 96,
    "pairs": 2,
    "singles": 2,
}
#: ``vocoder/config.json``.
VOCODER_CONFIG: Mapping[str, Any] = {"latent": 12, "inner": 48}
#: Bytes of a text; shorter ones are filled up with zeros.
TEXT_LENGTH = 64
#: Hz, and samples of a latent position.
SAMPLE_RATE = 16000
HOP = 320
#: Requests set the length as ``audio_length``, in seconds.
OPTIONS = PromptOptions(steps=20, guidance_scale=4.0, seconds=4.0, max_seconds=30.0)

#: The tiny model: seeded values under the names of the published checkpoints, in their containers.
TINY: Mapping[str, TinyPart] = {
    "transformer": TinyComponent(read_outline(HERE / "transformer.json"), sizes={}),
    "vocoder": TinyComponent(read_outline(HERE / "vocoder.json"), sizes={}),
}
