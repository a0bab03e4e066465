"""The transformer of driftwood, ported.

Parallel linears, vLLM-Omni's attention, tokens split over ranks.

Shapes: B batch, C latent channels, F latent frames, h and w latent rows and columns,
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
    """One layer: tokens to tokens, tokens to text, feed-forward; the first and the last are modulated."""

    def __init__(self, dim: int, heads: int, hidden: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.table = nn.Parameter(torch.zeros(6, dim))
        self.self_attn = SelfAttention(dim, heads, quant, f"{prefix}.self_attn")
        self.cross_attn = CrossAttention(dim, heads, quant, f"{prefix}.cross_attn")
        self.up = linear.merged(dim, [hidden, hidden], quant, f"{prefix}.up")
        self.down = linear.row(hidden, dim, quant, f"{prefix}.down")

    def forward(self, hidden_states: Tensor, text: Tensor, moment: Tensor, kv_length: int | None) -> Tensor:
        """Return the tokens ``[B, S, D]`` after this layer; the moment is ``[B, 6, D]``."""
        x = hidden_states
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.table + moment).unsqueeze(2).unbind(1)
        x = x + gate * self.self_attn(normed(x) * (1 + scale) + shift, kv_length)
        x = x + self.cross_attn(self.norm(x), text)
        value, wide = self.up(normed(x) * (1 + mlp_scale) + mlp_shift).chunk(2, -1)
        return x + mlp_gate * self.down(value * F.gelu(wide))


class DriftwoodTransformer(nn.Module):
    """Predicts the flow of latents from its noisy latents, the time and the bytes of a text.

    Args:
        channels: of the latents, C.
        width: width D of the tokens.
        heads: of every attention.
        stages: blocks.
        inner: width of the feed-forward.
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
        channels: int,
        width: int,
        heads: int,
        stages: int,
        inner: int,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.dim = dim = width
        self.patch = nn.Conv3d(channels, dim, (1, 2, 2), (1, 2, 2))
        self.text = nn.Embedding(256, dim)
        self.time_up = linear.column(dim, dim, quant_config, f"{prefix}.time_up")
        self.time_down = linear.row(dim, 6 * dim, quant_config, f"{prefix}.time_down")
        self.blocks = nn.ModuleList(
            Block(dim, heads, inner, quant_config, f"{prefix}.blocks.{index}") for index in range(stages)
        )
        self.head = nn.Linear(dim, 4 * channels)
        self.shard, self.gather = SPBoundary(), SPBoundary()
        self.eval().requires_grad_(False)

    def forward(self, latents: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """Take ``[B, C, F, h, w]``, ``[B]`` in 0..1 and ``[B, T]``; return the flow, shaped as the latents."""
        patches = self.patch(latents)
        f, h, w = grid = patches.shape[2:]
        x, words = patches.flatten(2).transpose(1, 2), self.text(text)
        length = x.shape[1]
        rows = [sinusoids(torch.arange(extent, device=x.device), self.dim) for extent in grid]
        places = (rows[0][:, None, None] + rows[1][None, :, None] + rows[2][None, None]).flatten(0, 2)
        moment = self.time_down(F.silu(self.time_up(sinusoids(1000 * time, self.dim).to(x.dtype))))
        x, moment = x + places.to(x.dtype), moment.unflatten(-1, (6, -1))
        (x,) = self.shard(pad_tokens(x))
        for block in self.blocks:
            x = block(x, words, moment, padded_length(length))
        (x,) = self.gather(x)
        x = self.head(normed(x[:, :length])).unflatten(1, (f, h, w)).unflatten(-1, (-1, 2, 2))
        return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(3, 4).flatten(4, 5)


def normed(x: Tensor) -> Tensor:
    """Normalize tokens ``[B, S, D]`` over D, without weights."""
    return F.layer_norm(x, x.shape[-1:])


def build_transformer(config: Mapping[str, Any]) -> DriftwoodTransformer:
    """Build the transformer of a ``transformer/config.json`` on the current default device and dtype.

    Inside an engine it is quantized as the engine's configuration says.
    """
    return build_module(DriftwoodTransformer, config, quant_config=engine_quantization(), prefix="transformer")
