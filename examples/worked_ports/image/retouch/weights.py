"""Components of retouch, and the rules from original names to their modules."""

from __future__ import annotations

from port_kit.port import Component
from port_kit.remap import RuleSet

from retouch import config

#: Written by ``port-kit rules suggest``; a float32 checkpoint may be run in bfloat16.
TRANSFORMER = RuleSet.from_file(config.HERE / "transformer.toml", allow_downcast=True)
CODEC = RuleSet.from_file(config.HERE / "codec.toml", allow_downcast=True)

#: In loading order. The name is also the folder in the model directory and the attribute of the pipeline.
COMPONENTS: tuple[Component, ...] = (
    Component("transformer", package="retouch"),
    Component("codec", package="retouch", kind="vae"),
)
