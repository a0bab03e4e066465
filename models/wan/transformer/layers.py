"""Layers of the blocks and adapters of the fusion transformer, except attention.

Shape suffixes: B batch, S tokens of a stream, D width, G distinct timesteps of a stream.

Statistics of norms and angles of timesteps are computed in float32 or wider, everything else in the dtype of the
weights, as in the original implementation under bfloat16.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.distributed import get_tensor_model_parallel_world_size

from port_kit.models.wan.transformer import fused_ops
from port_kit.parallel import linear
from port_kit.parallel.norm import FullWidthRMSNorm, square_sums

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from port_kit.parallel.fp8_rows import Rows

#: Largest period of the timestep's sinusoids; periods grow geometrically.
MAX_PERIOD = 10000.0


class QKNorm(FullWidthRMSNorm):
    """RMS norm of queries or keys over the width of all heads, fused with their rotation."""

    def forward(  # type: ignore[override]
        self, x_BSD: Tensor, squares_BS: Tensor | None, rope: Tensor | None = None, *, keep_unrotated: bool = False
    ) -> tuple[Tensor, ...]:
        """Normalize ``x`` and rotate its heads.

        Args:
            x_BSD: queries or keys; this rank's part of the width.
            squares_BS: their sums from :func:`tp_square_sums`.
            rope: table ``[1, S, R, 2]`` of their positions, or None for the norm alone.
            keep_unrotated: return the norm without rotation too, as the first tensor.
        """
        scale = fused_ops.RMSScale(self.weight, self.dim, self.eps)
        return fused_ops.rms_norm(x_BSD, scale, squares_BS, rope, keep_unrotated=keep_unrotated or rope is None)


def tp_square_sums(*tensors: Tensor) -> list[Tensor] | list[None]:
    """Return each token's sum of squares over the full width, float32 ``[B, S]``; None without tensor parallelism.

    Args:
        tensors: ``[B, S, D]`` of equal B, each this rank's part of the width; they share one all-reduce.
    """
    if get_tensor_model_parallel_world_size() == 1:
        return [None] * len(tensors)
    sums = torch.cat([square_sums(x) for x in tensors], 1)
    return list(linear.sum_over_ranks(sums).split([x.shape[1] for x in tensors], 1))


class FeedForward(nn.Module):
    """Two linears with a tanh-approximated GELU between them."""

    def __init__(self, dim: int, hidden: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.up = linear.column(dim, hidden, quant, f"{prefix}.up")
        self.down = linear.row(hidden, dim, quant, f"{prefix}.down")

    def forward(self, x_BSD: Rows) -> fused_ops.PartialSums:
        """Return ``[B, S, D]``, possibly as partial sums."""
        return linear.row_parallel_partials(self.down, fused_ops.linear_gelu(self.up, x_BSD, self.down))


class TextEmbedding(nn.Module):
    """Projection of text states to the width of the model. Texts are zero-padded first, and the padding is attended."""

    def __init__(self, text_dim: int, dim: int, length: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.length = length
        self.up = linear.column(text_dim, dim, quant, f"{prefix}.up")
        self.down = linear.row(dim, dim, quant, f"{prefix}.down")

    def forward(self, text: Tensor) -> Tensor:
        """Project raw states ``[B, T, text_dim]``, T at most ``length``, to ``[B, length, D]``."""
        padded = F.pad(text, (0, 0, 0, self.length - text.shape[1]))
        return self.down(fused_ops.linear_gelu(self.up, padded))


class TimeEmbedding(nn.Module):
    """Embedding of timesteps: sinusoids in float64, then two linears.

    Args:
        freq_dim: number of sinusoids.
        dim: width.
        quant: quantization of the linears.
        prefix: path of this module.
        precise: compute the linears in float32; else in the dtype of the weights.
    """

    def __init__(
        self, freq_dim: int, dim: int, quant: QuantizationConfig | None, prefix: str, *, precise: bool = False
    ) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.precise = precise
        self.up = linear.column(freq_dim, dim, quant, f"{prefix}.up")
        self.down = linear.row(dim, dim, quant, f"{prefix}.down")

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the embedding ``[..., D]`` of timesteps of any shape, in float32 if precise, else in ``dtype``."""
        if self.precise:
            up = linear.in_float32(self.up, timestep_embedding(timestep, self.freq_dim))
            return linear.in_float32(self.down, F.silu(up))
        return self.down(F.silu(self.up(timestep_embedding(timestep, self.freq_dim).to(dtype))))


class TimeProjection(nn.Module):
    """Projection of a timestep's embedding to the six modulation vectors that all blocks share."""

    def __init__(self, dim: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.linear = linear.column(dim, 6 * dim, quant, f"{prefix}.linear", gather=True)

    def forward(self, embedding: Tensor) -> Tensor:
        """Project ``[..., D]`` to ``[..., 6, D]``: shift, scale, gate of attention, then of the feed-forward.

        An embedding in float32 is projected in float32.
        """
        activated = F.silu(embedding)
        precise = embedding.dtype == torch.float32
        projected = linear.in_float32(self.linear, activated) if precise else self.linear(activated)
        return projected.unflatten(-1, (6, -1))


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Return ``[..., dim]`` in float64: cosines of the geometric frequencies, then sines."""
    half = dim // 2
    powers = torch.arange(half, dtype=torch.float64, device=timestep.device) / -half
    angles = timestep.double().unsqueeze(-1) * torch.exp(powers * math.log(MAX_PERIOD))
    return torch.cat((angles.cos(), angles.sin()), -1)


class GatedConv(nn.Module):
    """A gated feed-forward whose linears read a window of neighboring tokens.

    The convolutions are linears over unfolded windows, so that tensor parallelism and quantization apply to them.
    """

    def __init__(self, dim: int, hidden: int, kernel: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.kernel = kernel
        self.gate_up = linear.merged(dim * kernel, [hidden, hidden], quant, f"{prefix}.gate_up", bias=False)
        self.down = linear.row(hidden * kernel, dim, quant, f"{prefix}.down", bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Return ``[B, S, D]``."""
        gate, up = self.gate_up(unfold1d(x_BSD, self.kernel)).chunk(2, -1)
        return self.down(unfold1d(F.silu(gate) * up, self.kernel))


def unfold1d(x_BSD: Tensor, kernel: int) -> Tensor:
    """Return every token's window of ``kernel`` tokens, zero beyond the ends, ``[B, S, D * kernel]``.

    The taps of a channel are adjacent, as in a convolution's weight ``[out, in, kernel]`` flattened to a matrix.
    """
    if not x_BSD.shape[1]:
        return x_BSD.new_empty(x_BSD.shape[0], 0, x_BSD.shape[2] * kernel)
    margin = kernel // 2
    return F.pad(x_BSD, (0, 0, margin, margin)).unfold(1, kernel, 1).flatten(-2)
