"""Driftwood's networks: a text-to-video denoiser and the decoder of its latents."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def waves(n, width):
    f = torch.exp(-math.log(10000.0) * torch.arange(width // 2) / (width // 2))
    a = n.float()[..., None] * f
    return torch.cat([a.cos(), a.sin()], -1)


class Mixer(nn.Module):
    """Self-attention. One matrix makes queries, keys and values: three per head, side by side."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.per = heads, width // heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.fuse = nn.Linear(width, width)

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = self.to_qkv(x).view(b, s, self.heads, 3, self.per).permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.fuse(y.transpose(1, 2).reshape(b, s, -1))


class Reader(nn.Module):
    """Attention to the caption."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ask, self.answer = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.fuse = nn.Linear(width, width)

    def forward(self, x, words):
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        k, v = self.answer(words).chunk(2, -1)
        y = F.scaled_dot_product_attention(split(self.ask(x)), split(k), split(v))
        return self.fuse(y.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.wide, self.back = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x):
        value, gate = self.wide(x).chunk(2, -1)
        return self.back(value * F.gelu(gate))


class Stage(nn.Module):
    def __init__(self, width, heads, inner):
        super().__init__()
        self.mixer, self.reader, self.mlp = Mixer(width, heads), Reader(width, heads), Gated(width, inner)
        self.ln = nn.LayerNorm(width)
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x, moment, words):
        s1, c1, g1, s2, c2, g2 = (self.table + moment.unflatten(-1, (6, -1))).unsqueeze(2).unbind(1)
        plain = lambda t: F.layer_norm(t, t.shape[-1:])  # noqa: E731
        x = x + g1 * self.mixer(plain(x) * (1 + c1) + s1)
        x = x + self.reader(self.ln(x), words)
        return x + g2 * self.mlp(plain(x) * (1 + c2) + s2)


class DriftNet(nn.Module):
    def __init__(self, channels=8, width=64, heads=4, stages=3, inner=128):
        super().__init__()
        self.width = width
        self.cut = nn.Conv3d(channels, width, (1, 2, 2), (1, 2, 2))
        self.vocab = nn.Embedding(256, width)
        self.clock = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 6 * width))
        self.stages = nn.ModuleList([Stage(width, heads, inner) for _ in range(stages)])
        self.paste = nn.Linear(width, channels * 4)

    def forward(self, z, t, caption):
        """z [B, C, F, h, w], t [B] from 1 (noise) to 0, caption [B, T] of bytes; the result is dz/dt."""
        x = self.cut(z)
        b, _, f, h, w = x.shape
        where = [waves(torch.arange(n), self.width) for n in (f, h, w)]
        place = where[0][:, None, None] + where[1][None, :, None] + where[2][None, None]
        x = x.flatten(2).transpose(1, 2) + place.flatten(0, 2)
        moment, words = self.clock(waves(1000 * t, self.width)), self.vocab(caption)
        for stage in self.stages:
            x = stage(x, moment, words)
        x = self.paste(F.layer_norm(x, x.shape[-1:])).view(b, f, h, w, -1, 2, 2)
        return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(b, -1, f, 2 * h, 2 * w)


class Projector(nn.Module):
    """Latents to frames: every frame by itself."""

    def __init__(self, channels=8, inner=32):
        super().__init__()
        self.first = nn.Conv2d(channels, inner, 3, padding=1)
        self.second = nn.Conv2d(inner, inner, 3, padding=1)
        self.last = nn.Conv2d(inner, 48, 3, padding=1)

    def forward(self, z):
        y = self.first(z.transpose(1, 2).flatten(0, 1))
        y = y + self.second(F.silu(y))
        frames = F.pixel_shuffle(self.last(F.silu(y)), 4)
        return torch.tanh(frames).unflatten(0, (z.shape[0], -1)).transpose(1, 2)
