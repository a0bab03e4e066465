"""A module with the layouts that make tensor parallelism hard: fused, gated, grouped and interleaved channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from port_kit.autoparallel.subject import ModelScale, Subject, TokenScale


class Attention(nn.Module):
    """Grouped heads in one fused projection, a norm over all heads, a table per channel and a gate per head."""

    def __init__(self, heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.inner_dim = heads, heads // 2, head_dim, heads * head_dim
        self.qkv = nn.Linear(width, (heads + 2 * self.kv_heads) * head_dim)
        self.norm = nn.RMSNorm(heads * head_dim, eps=1e-6)
        self.gate = nn.Parameter(torch.randn(heads))
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        kv = self.kv_heads * self.head_dim
        q, k, v = self.qkv(x).split([self.inner_dim, kv, kv], dim=-1)
        q = self.norm(q) * table
        heads = [y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v)]
        y = scaled_dot_product_attention(*heads, enable_gqa=True).transpose(1, 2) * self.gate[:, None]
        return self.out(y.reshape(x.shape[0], -1, self.inner_dim))


class FeedForward(nn.Module):
    """A gated unit whose halves are interleaved, and a mix of few and many channels in its output projection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden)
        self.side = nn.Linear(width, hidden // 2)
        self.down = nn.Linear(hidden + hidden // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(torch.cat([silu(gate) * value, silu(self.side(x))], -1))


class Block(nn.Module):
    def __init__(self, heads: int, head_dim: int, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.attn, self.ff = Attention(heads, head_dim, width), FeedForward(width, hidden)

    def forward(self, x: Tensor, time: Tensor, table: Tensor) -> Tensor:
        shift, scale = self.modulation(time)[:, None].chunk(2, -1)
        x = x + self.attn(self.norm(x) * (1 + scale) + shift, table)
        return x + self.ff(self.norm(x))


class Model(nn.Module):
    def __init__(self, scale: ModelScale) -> None:
        super().__init__()
        heads, head_dim, width = 4 * scale.heads, 4 * scale.width, 12 * scale.width
        self.blocks = nn.ModuleList(Block(heads, head_dim, width, 20 * scale.width) for _ in range(2 * scale.depth))

    def forward(self, x: Tensor, time: Tensor, table: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, time, table)
        return x


def subject() -> Subject:
    """Return the subject."""

    def build(scale: ModelScale) -> nn.Module:
        torch.manual_seed(0)
        return Model(scale).eval()

    def inputs(tokens: TokenScale, scale: ModelScale | None = None) -> dict[str, Any]:
        scale = scale or ModelScale()
        width, inner, count = 12 * scale.width, 16 * scale.heads * scale.width, 6 + 2 * tokens.image
        generator = torch.Generator().manual_seed(0)
        batch = 1 + tokens.batch
        return {
            "x": torch.randn(batch, count, width, generator=generator),
            "time": torch.randn(batch, width, generator=generator),
            "table": torch.randn(1, count, inner, generator=generator),
        }

    return Subject("tests.autoparallel.tensor_subject:subject", build, inputs, lambda result: (result,))
