"""Tidepool's one component, and how its published names become the module's."""

from __future__ import annotations

from port_kit.port import Component
from port_kit.remap import Op, Rule, RuleSet

#: A patch is projected by a linear here and by a convolution in the checkpoint: flatten channels and taps.
_FLAT = Op.of("rearrange", pattern="o c f h w -> o (c f h w)")

TRANSFORMER = RuleSet(
    name="tidepool",
    rules=(
        Rule(r"patch\.weight", r"patch.weight", op=(_FLAT,)),
        Rule(r"patch\.bias", r"patch.bias"),
        Rule(r"layers\.(\d+)\.attn\.(q|k|v)\.(\w+)", r"blocks.\1.qkv.\3", shard=r"\2"),
        Rule(r"layers\.(\d+)\.attn\.out\.(\w+)", r"blocks.\1.out.\2"),
        Rule(r"layers\.(\d+)\.mlp\.0\.(\w+)", r"blocks.\1.up.\2"),
        Rule(r"layers\.(\d+)\.mlp\.2\.(\w+)", r"blocks.\1.down.\2"),
        Rule(r"layers\.(\d+)\.modulation\.(\w+)", r"blocks.\1.modulation.\2"),
        Rule(r"(bytes|time)\.(\w+)", r"\1.\2"),
        Rule(r"final\.(\w+)", r"final.\1"),
    ),
)

#: Its module is in ``model/transformer.py``, its rules are above, its configuration is in ``config.py``.
COMPONENTS: tuple[Component, ...] = (Component("transformer", package="tidepool"),)
