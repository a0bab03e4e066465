"""Components of driftwood, and the rules from original names to their modules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from port_kit.port import Component
from port_kit.remap import RuleSet


def _rules(name: str) -> RuleSet:
    """Read rules that ``port-kit rules suggest`` wrote; a float32 checkpoint may be run in bfloat16."""
    return replace(RuleSet.from_file(Path(__file__).with_name(name)), allow_downcast=True)


TRANSFORMER = _rules("transformer.toml")
PROJECTOR = _rules("projector.toml")

#: In loading order. The name is also the folder in the model directory and the attribute of the pipeline.
COMPONENTS: tuple[Component, ...] = (
    Component("transformer", package="driftwood"),
    Component("projector", package="driftwood", kind="vae"),
)
