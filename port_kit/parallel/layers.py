"""Layers that most diffusion transformers have, for ports: attention with parallel linears, and sinusoids.

Shapes: B batch, S tokens of this rank, T text tokens, D width, N heads of this rank, H head size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none

from port_kit.parallel import linear
from port_kit.parallel.fp8_linear import with_row_scales
from port_kit.parallel.sequence import PaddedAttention

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


class SelfAttention(nn.Module):
    """Attention of tokens to each other: ``qkv``, ``o``, and with ``qk_norm`` also ``norm_q`` and ``norm_k``.

    Args:
        dim: width D.
        heads: over all ranks.
        quant: quantization of the linears.
        prefix: path of this module in the pipeline.
        qk_norm: whether queries and keys are normalized per head, by their root mean square.
        qkv_bias: whether the projections of queries, keys and values have biases.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        quant: QuantizationConfig | None,
        prefix: str,
        *,
        qk_norm: bool = False,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.qkv = linear.qkv(dim, dim // heads, heads, quant, f"{prefix}.qkv", bias=qkv_bias)
        self.o = linear.row(dim, dim, quant, f"{prefix}.o")
        self.heads = self.qkv.num_heads
        self.attn = attention(self.heads, dim // heads, f"{prefix}.attn", role="self")
        self.norm_q, self.norm_k = ((nn.RMSNorm if qk_norm else nn.Identity)(dim // heads) for _ in range(2))

    def forward(self, x: Tensor, kv_length: int | None) -> Tensor:
        """Take this rank's tokens ``[B, S, D]``, and the length of all where they are padded; return ``[B, S, D]``."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, -1))
        return self.o(self.attn(self.norm_q(q), self.norm_k(k), v, kv_length).flatten(2))


class CrossAttention(nn.Module):
    """Attention of tokens to a text that every rank has completely: ``q``, ``kv`` and ``o``.

    Args:
        dim: width D.
        heads: over all ranks.
        quant: quantization of the linears.
        prefix: path of this module in the pipeline.
        qkv_bias: whether the projections of queries, keys and values have biases.
    """

    def __init__(
        self, dim: int, heads: int, quant: QuantizationConfig | None, prefix: str, *, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        self.q = linear.column(dim, dim, quant, f"{prefix}.q", bias=qkv_bias)
        self.kv = linear.merged(dim, [dim, dim], quant, f"{prefix}.kv", bias=qkv_bias)
        self.o = linear.row(dim, dim, quant, f"{prefix}.o")
        self.heads = self.q.output_size_per_partition // (dim // heads)
        self.attn = attention(self.heads, dim // heads, f"{prefix}.attn", role="cross", skip_sequence_parallel=True)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Take this rank's tokens ``[B, S, D]`` and the text ``[B, T, D]``; return ``[B, S, D]``."""
        k, v = self.kv(text).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (self.q(x), k, v))
        return self.o(self.attn(q, k, v).flatten(2))


def attention(heads: int, head_dim: int, prefix: str, **options: Any) -> PaddedAttention:
    """Return attention of queries, keys and values ``[B, S, N, H]`` with the usual scale and no mask.

    Args:
        heads: of this rank, N.
        head_dim: H.
        prefix: path of the layer in the pipeline.
        options: of vLLM-Omni's attention layer, such as ``role`` and ``skip_sequence_parallel``.
    """
    return PaddedAttention(
        num_heads=heads,
        head_size=head_dim,
        causal=False,
        softmax_scale=head_dim**-0.5,
        num_kv_heads=heads,
        prefix=prefix,
        **options,
    )


def sinusoids(values: Tensor, dim: int) -> Tensor:
    """Return float32 ``[..., D]``: cosines of geometric frequencies from 1 down to 1/10000, then sines."""
    powers = torch.arange(dim // 2, dtype=torch.float32, device=values.device) / -(dim // 2)
    angles = values.float().unsqueeze(-1) * torch.exp(powers * math.log(10000.0))
    return torch.cat((angles.cos(), angles.sin()), -1)


def engine_quantization() -> QuantizationConfig | None:
    """Return the quantization of the engine that is being started; None outside of an engine.

    Dynamic FP8 has a scale per token and output (:mod:`~port_kit.parallel.fp8_linear`) where the device has kernels.
    """
    engine = get_current_diffusion_config_or_none()
    return with_row_scales(engine.quantization_config) if engine is not None else None
