"""Retouch: a picture and an instruction to an edited picture."""

import torch
from torch import nn
from torch.nn import functional as F

from .parts import CaptionAttention, Residual, SelfAttention, angles_of


class Layer(nn.Module):
    def __init__(self, dim, n_head, ratio):
        super().__init__()
        self.ln_a, self.ln_b, self.ln_c = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.att, self.cap = SelfAttention(dim, n_head), CaptionAttention(dim, n_head)
        self.ff = nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))

    def forward(self, h, caption):
        h = h + self.att(self.ln_a(h))
        h = h + self.cap(self.ln_b(h), caption)
        return h + self.ff(self.ln_c(h))


class Editor(nn.Module):
    def __init__(self, z_dim=8, dim=64, n_head=4, depth=3, ratio=2):
        super().__init__()
        self.dim = dim
        self.proj_in, self.proj_out = nn.Conv2d(z_dim, dim, 1), nn.Linear(dim, z_dim)
        self.role = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.text_table = nn.Embedding(256, dim)
        self.t_mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.trunk = nn.ModuleList(Layer(dim, n_head, ratio) for _ in range(depth))
        self.ln_out = nn.LayerNorm(dim)

    def forward(self, noisy, picture, t, caption):
        """noisy and picture [B, C, h, w], t [B], caption [B, T]; returns the velocity of noisy."""
        b, _, rows, cols = noisy.shape
        spots = angles_of(torch.arange(rows), self.dim)[:, None] + angles_of(torch.arange(cols), self.dim)
        spots = spots.flatten(0, 1)
        streams = [self.proj_in(z).flatten(2).mT + spots + role for z, role in zip((noisy, picture), self.role)]
        h = torch.cat(streams, 1) + self.t_mlp(angles_of(1000 * t, self.dim))[:, None]
        words = self.text_table(caption)
        for layer in self.trunk:
            h = layer(h, words)
        h = self.proj_out(self.ln_out(h[:, : rows * cols]))
        return h.mT.unflatten(2, (rows, cols))


class Codec(nn.Module):
    """Pixels to latents and back; four pixels a side are one latent."""

    def __init__(self, z_dim=8, dim=32):
        super().__init__()
        self.down = nn.Conv2d(3, dim, 4, 4)
        self.mid_down, self.to_z = Residual(dim), nn.Conv2d(dim, z_dim, 1)
        self.from_z, self.mid_up = nn.Conv2d(z_dim, dim, 3, padding=1), Residual(dim)
        self.up = nn.Conv2d(dim, 48, 3, padding=1)

    def encode(self, pixels):
        return self.to_z(self.mid_down(self.down(pixels)))

    def forward(self, z):
        return torch.tanh(F.pixel_shuffle(self.up(self.mid_up(self.from_z(z))), 4))
