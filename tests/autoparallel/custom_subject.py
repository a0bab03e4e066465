"""A module of no library: attention in a function of its own, joint tokens, and a pooled gate between blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from port_kit.autoparallel.subject import ModelScale, Subject, TokenScale


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Compute attention of [B, S, C] tensors."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Attention of text and image tokens to each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return image and text tokens."""
        x = torch.cat([image, text], 1)
        x = x + self.out(attend(*self.qkv(x).chunk(3, -1), self.heads))
        return x[:, : image.shape[1]], x[:, image.shape[1] :]


class Model(nn.Module):
    """Blocks, and a gate computed from all image tokens after each of them."""

    def __init__(self, scale: ModelScale) -> None:
        super().__init__()
        width = 32 * scale.heads * scale.width
        self.enter = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width, 4 * scale.heads) for _ in range(2 * scale.depth))
        self.leave = nn.Linear(width, 8)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Return image tokens."""
        image, text = self.enter(image), self.enter(text)
        for block in self.blocks:
            image, text = block(image, text)
            image = image * image.mean(1, keepdim=True).sigmoid()
        return self.leave(image)


def _inputs(tokens: TokenScale, _model: ModelScale | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = 1 + tokens.batch
    return {
        "image": torch.randn(shape, 10 + 4 * tokens.image, 8, generator=generator),
        "text": torch.randn(shape, 7 + 3 * tokens.text, 8, generator=generator),
    }


def _build(scale: ModelScale) -> nn.Module:
    torch.manual_seed(0)
    return Model(scale).eval()


def subject() -> Subject:
    """Return the module as a subject."""
    return Subject("tests.autoparallel.custom_subject:subject", _build, _inputs, lambda result: (result,))
