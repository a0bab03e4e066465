"""The transformer of retouch, ported.

Parallel linears, vLLM-Omni's attention, tokens split over ranks.

Shapes: B batch, C latent channels, h and w latent rows and columns,
S tokens of this rank, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from cache_dit import ForwardPattern
from port_kit.parallel import linear
from port_kit.parallel.layers import CrossAttention, SelfAttention, engine_quantization, sinusoids
from port_kit.parallel.sequence import SPBoundary, make_sp_plan, pad_tokens, padded_length
from port_kit.port import build_module
from torch import Tensor, nn
from torch.nn import functional as F
from vllm_omni.diffusion.cache.cachedit import CacheDiTAdapterConfig

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


class Block(nn.Module):
    """One layer: tokens to tokens, tokens to text, feed-forward."""

    def __init__(self, dim: int, heads: int, hidden: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attn = SelfAttention(dim, heads, quant, f"{prefix}.self_attn", qk_norm=True, qkv_bias=False)
        self.cross_attn = CrossAttention(dim, heads, quant, f"{prefix}.cross_attn", qkv_bias=False)
        self.up = linear.column(dim, hidden, quant, f"{prefix}.up")
        self.down = linear.row(hidden, dim, quant, f"{prefix}.down")

    def forward(self, hidden_states: Tensor, text: Tensor, kv_length: int | None) -> Tensor:
        """Return the tokens ``[B, S, D]`` after this layer."""
        x = hidden_states
        x = x + self.self_attn(self.norm1(x), kv_length)
        x = x + self.cross_attn(self.norm2(x), text)
        return x + self.down(F.gelu(self.up(self.norm3(x))))


class RetouchTransformer(nn.Module):
    """Predicts the flow of latents from its noisy latents, those of a picture, the time and the bytes of a text.

    The tokens of the picture follow those of the output; attention is over both.

    Args:
        z_dim: channels of the latents, C.
        dim: width D of the tokens.
        n_head: of every attention.
        depth: blocks.
        ratio: width of the feed-forward, in multiples of D.
        quant_config: quantization of the linears, None for none.
        prefix: path of this module in the pipeline.
    """

    _repeated_blocks: ClassVar = ["Block"]
    _layerwise_offload_blocks_attrs: ClassVar = ["blocks"]
    _hsdp_shard_conditions: ClassVar = [lambda _name, module: isinstance(module, Block)]
    _sp_plan: ClassVar = make_sp_plan({"shard": (3,)}, {"gather": (3,)})
    _cache_dit_adapter_config: ClassVar = CacheDiTAdapterConfig(
        block_forward_patterns={"blocks": ForwardPattern.Pattern_3}, has_separate_cfg=True, check_forward_pattern=False
    )
    packed_modules_mapping: ClassVar = {"qkv": ["q", "k", "v"], "kv": ["k", "v"]}

    def __init__(
        self,
        *,
        z_dim: int,
        dim: int,
        n_head: int,
        depth: int,
        ratio: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.patch = nn.Conv2d(z_dim, dim, 1)
        self.role = nn.Parameter(torch.zeros(2, dim))
        self.text = nn.Embedding(256, dim)
        self.time_up = linear.column(dim, dim, quant_config, f"{prefix}.time_up")
        self.time_down = linear.row(dim, dim, quant_config, f"{prefix}.time_down")
        self.blocks = nn.ModuleList(
            Block(dim, n_head, ratio * dim, quant_config, f"{prefix}.blocks.{index}") for index in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, z_dim)
        self.shard, self.gather = SPBoundary(), SPBoundary()
        self.eval().requires_grad_(False)

    def forward(self, latents: Tensor, picture: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """Take twice ``[B, C, h, w]``, ``[B]`` in 0..1 and ``[B, T]``; return the flow, shaped as the latents."""
        words, grid = self.text(text), latents.shape[2:]
        rows = [sinusoids(torch.arange(extent, device=latents.device), self.dim) for extent in grid]
        places = (rows[0][:, None] + rows[1]).flatten(0, 1).to(words.dtype)
        parts = [self.patch(part).flatten(2).transpose(1, 2) + places for part in (latents, picture)]
        moment = self.time_down(F.silu(self.time_up(sinusoids(1000 * time, self.dim).to(words.dtype))))
        x = torch.cat([part + role for part, role in zip(parts, self.role, strict=True)], 1) + moment[:, None]
        length = x.shape[1]
        (x,) = self.shard(pad_tokens(x))
        for block in self.blocks:
            x = block(x, words, padded_length(length))
        (x,) = self.gather(x)
        return self.head(self.norm(x[:, : length // 2])).transpose(1, 2).unflatten(2, grid)


def build_transformer(config: Mapping[str, Any]) -> RetouchTransformer:
    """Build the transformer of a ``transformer/config.json`` on the current default device and dtype.

    Inside an engine it is quantized as the engine's configuration says.
    """
    return build_module(RetouchTransformer, config, quant_config=engine_quantization(), prefix="transformer")
