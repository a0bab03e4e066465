"""Cases of Flux and the classes derived from it: joint blocks of two streams, then blocks of one."""

from __future__ import annotations

from typing import Any

import torch

from port_kit.autoparallel.diffusers_cases.case import Case
from port_kit.autoparallel.diffusers_cases.sizes import Draw, Sizes


def _config(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "in_channels": 12,
        "num_layers": 2 * sizes.depth,
        "num_single_layers": 2 * sizes.depth,
        "attention_head_dim": sizes.head_dim,
        "num_attention_heads": sizes.heads,
        "joint_attention_dim": 24,
        "axes_dims_rope": sizes.axes(4, 6, 6),
        **more,
    }


def _inputs(draw: Draw, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": draw.normal(draw.image, 12),
        "encoder_hidden_states": draw.texts(24),
        "timestep": draw.times(1.0),
        "img_ids": draw.grid().float(),
        "txt_ids": torch.zeros(draw.text, 3),
        **more,
    }


def _flux2_config(sizes: Sizes) -> dict[str, Any]:
    return _config(sizes, axes_dims_rope=sizes.axes(4, 4, 4, 4), timestep_guidance_channels=32)


def _flux2_inputs(draw: Draw) -> dict[str, Any]:
    image, text = torch.zeros(draw.image, 4), torch.zeros(draw.text, 4)
    image[:, :3], text[:, 3] = draw.grid(), torch.arange(draw.text)
    return _inputs(draw, img_ids=image, txt_ids=text, guidance=torch.full((draw.batch,), 4.0))


def _chroma_config(sizes: Sizes) -> dict[str, Any]:
    approximator = {"approximator_num_channels": 16, "approximator_hidden_dim": 40, "approximator_layers": 2}
    return _config(sizes, **approximator)


def _chroma_inputs(draw: Draw) -> dict[str, Any]:
    mask = torch.cat([draw.mask(draw.text), torch.ones(draw.batch, draw.image)], dim=1)
    return _inputs(draw, attention_mask=mask)


def _fibo_inputs(draw: Draw) -> dict[str, Any]:
    layers = [draw.texts(20) for _ in range(4 * draw.sizes.depth)]
    return _inputs(draw, text_encoder_layers=layers, timestep=draw.times())


CASES = {
    "BriaFiboTransformer2DModel": Case(lambda sizes: _config(sizes, text_encoder_dim=20), _fibo_inputs),
    "BriaTransformer2DModel": Case(_config, lambda draw: _inputs(draw, timestep=draw.times())),
    "ChromaTransformer2DModel": Case(_chroma_config, _chroma_inputs),
    "Flux2Transformer2DModel": Case(_flux2_config, _flux2_inputs),
    "FluxTransformer2DModel": Case(
        lambda sizes: _config(sizes, pooled_projection_dim=20, guidance_embeds=True),
        lambda draw: _inputs(draw, pooled_projections=draw.normal(20), guidance=torch.full((draw.batch,), 3.5)),
    ),
    "LongCatImageTransformer2DModel": Case(_config, _inputs),
    "OvisImageTransformer2DModel": Case(lambda sizes: _config(sizes, out_channels=12), _inputs),
}
