"""Murmur: captions to audio. Sound and caption attend to each other, then the sound continues alone."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

SOUND, WORDS = 0, 1


class ConvGLU(nn.Module):
    def __init__(self, d, inner):
        super().__init__()
        self.w1, self.w2 = nn.Conv1d(d, inner, 3, padding=1), nn.Conv1d(inner, d, 3, padding=1)
        self.w3 = nn.Conv1d(d, inner, 3, padding=1)

    def forward(self, x):
        y = x.transpose(1, 2)
        return self.w2(F.silu(self.w1(y)) * self.w3(y)).transpose(1, 2)


class GLU(nn.Module):
    def __init__(self, d, inner):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(d, inner), nn.Linear(inner, d), nn.Linear(d, inner)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Side(nn.Module):
    """What one of the two streams has for itself."""

    def __init__(self, d, heads, ffn):
        super().__init__()
        self.heads = heads
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.qn, self.kn = nn.RMSNorm(d // heads), nn.RMSNorm(d // heads)
        self.proj, self.ffn = nn.Linear(d, d), ffn

    def before(self, x, ada):
        y = F.layer_norm(x, x.shape[-1:]) * (1 + ada[1]) + ada[0]
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.qn(q), self.kn(k), v

    def after(self, x, y, ada):
        x = x + ada[2] * self.proj(y.transpose(1, 2).flatten(2))
        return x + ada[5] * self.ffn(F.layer_norm(x, x.shape[-1:]) * (1 + ada[4]) + ada[3])


class Layer(nn.Module):
    def __init__(self, d, heads, inner, streams):
        super().__init__()
        ffns = [ConvGLU(d, inner), GLU(d, inner)]
        self.sides = nn.ModuleList([Side(d, heads, ffn) for ffn in ffns[:streams]])

    def forward(self, xs, cond, rope):
        adas = [side.ada(cond)[:, None].chunk(6, -1) for side in self.sides]
        parts = [side.before(x, ada) for side, x, ada in zip(self.sides, xs, adas)]
        q, k, v = (torch.cat(group, 2) for group in zip(*parts))
        y = F.scaled_dot_product_attention(spin(q, rope), spin(k, rope), v)
        ys = y.split([x.shape[1] for x in xs], 2)
        return [side.after(x, y, ada) for side, x, y, ada in zip(self.sides, xs, ys, adas)]


def spin(x, angles):
    a, b = x.chunk(2, -1)
    angles = angles[:, None, :]
    n = angles.shape[0]
    cos, sin = angles.cos().transpose(0, 1), angles.sin().transpose(0, 1)
    ra, rb = a[:, :, :n], b[:, :, :n]
    turned = torch.cat([ra * cos - rb * sin, ra * sin + rb * cos], -1)
    return torch.cat([turned, x[:, :, n:]], 2)


class Murmur(nn.Module):
    def __init__(self, latent=12, d=64, heads=4, inner=96, pairs=2, singles=2):
        super().__init__()
        self.d, self.per = d, d // heads
        self.enter = nn.Conv1d(latent, d, 7, padding=3)
        self.letters = nn.Embedding(256, d)
        self.when = nn.Linear(d, d)
        self.pairs = nn.ModuleList([Layer(d, heads, inner, 2) for _ in range(pairs)])
        self.singles = nn.ModuleList([Layer(d, heads, inner, 1) for _ in range(singles)])
        self.leave = nn.Linear(d, latent)

    def forward(self, z, t, letters):
        """z [B, C, L], t [B] in 0..1 and letters [B, T]; the result is the flow [B, C, L]."""
        sound, words = self.enter(z).transpose(1, 2), self.letters(letters)
        steps = torch.arange(self.d // 2) / -(self.d // 2)
        phase = 1000 * t[:, None] * torch.exp(steps * math.log(10000.0))
        cond = self.when(torch.cat([phase.cos(), phase.sin()], -1)) + words.mean(1)
        powers = torch.arange(0, self.per, 2) / self.per
        rope = torch.arange(sound.shape[1])[:, None] * 10000.0**-powers
        xs = [sound, words]
        for layer in self.pairs:
            xs = layer(xs, cond, rope)
        xs = xs[:1]
        for layer in self.singles:
            xs = layer(xs, cond, rope)
        return self.leave(xs[SOUND]).transpose(1, 2)
