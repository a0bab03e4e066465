"""The vocoder of murmur."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Samples of a latent position.
HOP = 320


class Vocoder(nn.Module):
    """Turns latents ``[B, C, L]`` into samples ``[B, 320 L]`` in [-1, 1].

    Args:
        latent: channels of the latents, C.
        inner: width of the layers.
    """

    def __init__(self, *, latent: int, inner: int) -> None:
        super().__init__()
        self.pre = nn.Conv1d(latent, inner, 7, padding=3)
        self.post = nn.Conv1d(inner, HOP, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode audio."""
        return torch.tanh(self.post(F.leaky_relu(self.pre(latents), 0.1))).transpose(1, 2).flatten(1)


def build_vocoder(config: Mapping[str, Any]) -> Vocoder:
    """Build the vocoder of a ``vocoder/config.json`` on the current default device and dtype."""
    return Vocoder(**config)
