"""The original implementation of Tidepool, in plain torch and with the names of the checkpoint."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention with separate projections."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens (B, V, D) after attention over V."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention, then a feed-forward; both modulated."""

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Linear(dim, 4 * dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return the tokens (B, V, D) after this layer; the condition is (B, D)."""
        shift, scale, shift_mlp, scale_mlp = self.modulation(condition)[:, None].chunk(4, -1)
        x = x + self.attn(_norm(x) * (1 + scale) + shift)
        return x + self.mlp(_norm(x) * (1 + scale_mlp) + shift_mlp)


class Tidepool(nn.Module):
    """Noisy frames, a time and a prompt to a velocity."""

    def __init__(self, dim: int, heads: int, layers: int, ffn_dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = tuple(patch)
        self.patch = nn.Conv3d(3, dim, self.patch_size, self.patch_size)
        self.bytes = nn.Embedding(256, dim)
        self.time = nn.Linear(dim, dim)
        self.layers = nn.ModuleList(Layer(dim, heads, ffn_dim) for _ in range(layers))
        self.final = nn.Linear(dim, 3 * math.prod(self.patch_size))

    def forward(self, video: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        """Predict the velocity of (B, 3, F, H, W) at time (B,) for a prompt of bytes (B, T)."""
        patches = self.patch(video)
        x = patches.flatten(2).transpose(1, 2)
        x = x + _sinusoid(torch.arange(x.shape[1]), x.shape[-1])
        condition = nn.functional.silu(self.time(_sinusoid(1000 * time, x.shape[-1])) + self.bytes(prompt).mean(1))
        for layer in self.layers:
            x = layer(x, condition)
        return self._frames(self.final(_norm(x)), patches.shape[2:])

    def _frames(self, x: Tensor, grid: torch.Size) -> Tensor:
        (f, h, w), (pf, ph, pw) = grid, self.patch_size
        whole = x.reshape(-1, f, h, w, 3, pf, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return whole.reshape(-1, 3, f * pf, h * ph, w * pw)


def _norm(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:])


def _sinusoid(positions: Tensor, dim: int) -> Tensor:
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2) / (dim // 2))
    angles = positions.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)
