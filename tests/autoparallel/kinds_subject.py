"""Modules as in original code: each has one kind of code that inference must understand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from port_kit.autoparallel.attention_packages import attention_packages
from port_kit.autoparallel.cpu import on_cpu
from port_kit.autoparallel.subject import ModelScale, Subject, TokenScale

with attention_packages("flash_attn", "flash_attn_interface", "xformers", "sageattention"):
    import flash_attn_interface
    from flash_attn import flash_attn_varlen_func
    from flash_attn.flash_attn_interface import flash_attn_func as flash_2
    from sageattention import sageattn
    from xformers import ops as xops


class ConvLast(nn.Conv1d):
    """Convolution that reads channels from the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class _Block(nn.Module):
    """Self-attention over one stream; subclasses attend."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).unflatten(-1, (self.heads, -1)) for part in (self.q, self.k, self.v))
        return x + self.out(self.attend(q, k, v).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class Flash2(_Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_2(q, k, v, 0.0, softmax_scale=0.3)


class Flash3(_Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_interface.flash_attn_func(q, k, v)


class Packed(_Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size, count = q.shape[:2]
        bounds = torch.arange(size + 1, dtype=torch.int32) * TOTAL[0]
        out = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), bounds, bounds, count, count)
        return out.unflatten(0, (size, count))


class Stored(_Block):
    """Attention method that the constructor chooses."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.core = self.chosen

    def chosen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_2(q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.core(q, k, v)


class Xformers(_Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return xops.memory_efficient_attention(q, k, v)


class Sage(_Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sageattn(q, k, v, tensor_layout="NHD")


#: Tokens of all ranks, as code that packs rows knows them.
TOTAL = [0]


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lens: Tensor | None = None,
    k_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    q_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Refuse a CPU, as helpers around flash-attn do."""
    raise AssertionError("q.device.type == 'cuda'")


class Helper(_Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, k_lens=torch.full((len(q),), TOTAL[0] - 3, device="cuda"))


class Softmax(nn.Module):
    """Explicit softmax, in code that reads the number of tokens before it projects them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        size, count, _ = x.shape
        q, k, v = self.qkv(x).reshape(size, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.einsum("bnqh,bnkh->bnqk", self.q_norm(q), k).softmax(-1)
        return self.out(torch.einsum("bnqk,bnkh->bqnh", weights, v).reshape(size, count, -1))


class SoftmaxBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), Softmax(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


class Streams(nn.Module):
    """Three streams in one attention, heads in a layer of einops, and convolutions over tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleDict({name: nn.Linear(width, 3 * width) for name in ("audio", "image", "text")})
        self.split = Rearrange("b n (h d j) -> j b h n d", h=heads, j=3)
        self.out = ConvLast(width, width, 3, padding=1)
        self.image_out, self.text_out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = ConvLast(width, 2 * width, 3, padding=1), ConvLast(2 * width, width, 5, padding=2)

    def forward(self, audio: Tensor, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        named = {"audio": audio, "image": image, "text": text}
        q, k, v = torch.cat([self.split(self.qkv[name](x)) for name, x in named.items()], 3).unbind(0)
        y = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        parts = y.split([audio.shape[1], image.shape[1], text.shape[1]], 1)
        audio = audio + self.out(parts[0])
        return (
            audio + self.down(self.up(audio).relu()),
            image + self.image_out(parts[1]),
            text + self.text_out(parts[2]),
        )


class Model(nn.Module):
    """Blocks of one class over one stream."""

    def __init__(self, kind: Callable[[int, int], nn.Module], scale: ModelScale) -> None:
        super().__init__()
        width, heads = 32 * scale.heads * scale.width, 4 * scale.heads
        self.blocks = nn.ModuleList(kind(width, heads) for _ in range(2 * scale.depth))
        self.enter = nn.Linear(6, width)

    def forward(self, audio: Tensor) -> Tensor:
        """Return tokens."""
        TOTAL[0] = audio.shape[1]
        x = self.enter(audio)
        for block in self.blocks:
            x = block(x)
        return x


class StreamModel(Model):
    def forward(self, audio: Tensor, image: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        """Return the tokens of one stream."""
        streams = tuple(map(self.enter, (audio, image, text)))
        for block in self.blocks:
            streams = block(*streams)
        return streams[0]


KINDS = {
    kind.__name__: kind for kind in (Flash2, Flash3, Packed, Stored, Xformers, Sage, Helper, SoftmaxBlock, Streams)
}


def subject(kind: str) -> Subject:
    """Return a model of one kind of blocks."""
    cls = StreamModel if kind == "Streams" else Model

    def build(scale: ModelScale) -> nn.Module:
        torch.manual_seed(0)
        return cls(KINDS[kind], scale).eval()

    def inputs(tokens: TokenScale, _model: ModelScale | None = None) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        counts = {"audio": 21 + 5 * tokens.audio, "image": 8 + 3 * tokens.image, "text": 7 + 2 * tokens.text}
        names = counts if kind == "Streams" else ("audio",)
        return {name: torch.randn(1 + tokens.batch, counts[name], 6, generator=generator) for name in names}

    return on_cpu(Subject(f"tests.autoparallel.kinds_subject:{kind}", build, inputs, lambda result: (result,)))
