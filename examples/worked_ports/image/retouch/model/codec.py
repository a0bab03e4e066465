"""The codec of retouch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Pixels of a latent pixel along height and width.
SCALE = 4


class Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_1, self.conv_2 = (nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, D, h, w]``."""
        return x + self.conv_2(F.silu(self.conv_1(x)))


class Codec(nn.Module):
    """Turns latents ``[B, C, h, w]`` into pixels ``[B, 3, 4 h, 4 w]`` in [-1, 1], and back.

    Args:
        z_dim: channels of the latents, C.
        dim: width D of the layers.
    """

    def __init__(self, *, z_dim: int, dim: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, dim, SCALE, SCALE)
        self.mid_down, self.to_z = Residual(dim), nn.Conv2d(dim, z_dim, 1)
        self.from_z, self.mid_up = nn.Conv2d(z_dim, dim, 3, padding=1), Residual(dim)
        self.up = nn.Conv2d(dim, 3 * SCALE * SCALE, 3, padding=1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images in [-1, 1]."""
        return self.to_z(self.mid_down(self.down(pixels)))

    def forward(self, latents: Tensor) -> Tensor:
        """Decode images."""
        return torch.tanh(F.pixel_shuffle(self.up(self.mid_up(self.from_z(latents))), SCALE))


def build_codec(config: Mapping[str, Any]) -> Codec:
    """Build the codec of a ``codec/config.json`` on the current default device and dtype."""
    return Codec(**config)
