"""Subject of the transformer of ``black-forest-labs/flux``."""

from __future__ import annotations

from typing import Any

import torch
from flux.model import Flux, FluxParams
from torch import Tensor, nn

from port_kit.autoparallel.diffusers_cases.case import randomize
from port_kit.autoparallel.subject import ModelScale, Subject, TokenScale


def _build(scale: ModelScale) -> nn.Module:
    torch.manual_seed(0)
    params = FluxParams(
        in_channels=8,
        out_channels=8,
        vec_in_dim=12,
        context_in_dim=10,
        hidden_size=64 * scale.heads * scale.width,
        mlp_ratio=4.0,
        num_heads=4 * scale.heads,
        depth=2 * scale.depth,
        depth_single_blocks=2 * scale.depth,
        axes_dim=[4 * scale.width, 6 * scale.width, 6 * scale.width],
        theta=10_000,
        qkv_bias=True,
        guidance_embed=True,
    )
    model = Flux(params)
    randomize(model)
    return model.float().eval()


def _inputs(tokens: TokenScale, _model: ModelScale | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    batch, rows, columns, words = 1 + tokens.batch, 3 + tokens.image, 5, 7 + 3 * tokens.text

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
    return {
        "img": draw(rows * columns, 8),
        "img_ids": grid.expand(batch, -1, -1),
        "txt": draw(words, 10),
        "txt_ids": torch.zeros(batch, words, 3),
        "timesteps": torch.full((batch,), 0.4),
        "y": draw(12),
        "guidance": torch.full((batch,), 3.5),
    }


def make_subject() -> Subject:
    """Return the subject."""
    return Subject("flux_subject:make_subject", _build, _inputs, output=lambda result: (result,))
