"""Cases of Wan and the classes derived from it: video self-attention, then cross-attention to a text."""

from __future__ import annotations

from typing import Any

from port_kit.autoparallel.diffusers_cases.case import Case
from port_kit.autoparallel.diffusers_cases.sizes import Draw, Sizes


def _config(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": sizes.heads,
        "attention_head_dim": sizes.head_dim,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 96 * sizes.width,
        "num_layers": 2 * sizes.depth,
        "rope_max_seq_len": 32,
        **more,
    }


def _inputs(draw: Draw, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": draw.clip(4),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.texts(24),
        **more,
    }


CASES = {
    "WanTransformer3DModel": Case(_config, _inputs),
}
