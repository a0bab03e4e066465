"""The projector of driftwood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Pixels of a latent voxel along height and width.
SCALE = 4


class Projector(nn.Module):
    """Turns latents ``[B, C, F, h, w]`` into pixels ``[B, 3, F, 4 h, 4 w]`` in [-1, 1].

    Args:
        channels: of the latents, C.
        inner: width of the layers.
    """

    def __init__(self, *, channels: int, inner: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, inner, 3, padding=1)
        self.second = nn.Conv2d(inner, inner, 3, padding=1)
        self.last = nn.Conv2d(inner, 3 * SCALE * SCALE, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode every frame by itself."""
        frames = self.first(latents.transpose(1, 2).flatten(0, 1))
        frames = frames + self.second(F.silu(frames))
        pixels = F.pixel_shuffle(self.last(F.silu(frames)), SCALE).unflatten(0, (latents.shape[0], -1))
        return torch.tanh(pixels).transpose(1, 2)


def build_projector(config: Mapping[str, Any]) -> Projector:
    """Build the projector of a ``projector/config.json`` on the current default device and dtype."""
    return Projector(**config)
