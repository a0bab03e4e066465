"""Components of Ovi, by name only."""

from __future__ import annotations

from port_kit.models.wan.weights.components import components

COMPONENTS = components("OVI_TRANSFORMER_CONFIG")
