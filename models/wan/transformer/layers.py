"""Layers of the blocks and adapters of the fusion transformer, except attention.

Shape suffixes: B batch, S tokens of a stream, D width, G distinct timesteps of a stream.

The dtypes are those of the original under bfloat16: statistics of norms and angles of timesteps in float32 or wider,
everything else in the dtype of the weights.
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
from port_kit.parallel.norm import FullWidthRMSNorm

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

#: Periods of the timestep's sinusoids grow geometrically up to this.
MAX_PERIOD = 10000.0


class QKNorm(FullWidthRMSNorm):
    """RMS norm of queries or keys over the width of all heads together, and the rotation after it, in one pass."""

    def forward(  # type: ignore[override]
        self, x_BSD: Tensor, squares_BS: Tensor | None = None, rope: Tensor | None = None, *, plain: bool = False
    ) -> tuple[Tensor, ...]:
        """Normalise ``x``, whose last dimension is this rank's part of the width, and rotate its heads.

        Args:
            x_BSD: queries or keys.
            squares_BS: what :func:`tp_square_sums` gave for them.
            rope: table ``[1, S, R, 2]`` of their positions, or None for the norm alone.
            plain: give the norm without the rotation as well, first.
        """
        plain = plain or rope is None
        return fused_ops.rms_norm(x_BSD, self.weight, squares_BS, rope, width=self.dim, eps=self.eps, plain=plain)


def tp_square_sums(*tensors: Tensor) -> list[Tensor] | list[None]:
    """Return each token's sum of squares over the whole width, float32 ``[B, S]``; None where one rank has all of it.

    Args:
        tensors: ``[B, S, D]`` of equal B, each with this rank's part of the width; they share one all-reduce.
    """
    if get_tensor_model_parallel_world_size() == 1:
        return [None] * len(tensors)
    sums = torch.cat([fused_ops.square_sums(x) for x in tensors], 1)
    return list(linear.sum_over_ranks(sums).split([x.shape[1] for x in tensors], 1))


class FeedForward(nn.Module):
    """Two linears with a tanh-approximated GELU between them."""

    def __init__(self, dim: int, hidden: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.up = linear.column(dim, hidden, quant, f"{prefix}.up")
        self.down = linear.row(hidden, dim, quant, f"{prefix}.down")

    def forward(self, x_BSD: Tensor) -> fused_ops.PartialSums:
        """Return ``[B, S, D]``, or summands of it."""
        return linear.row_parallel_partials(self.down, fused_ops.linear_gelu(self.up, x_BSD))


class TextEmbedding(nn.Module):
    """Bring text states to the width of the model. Texts are padded with zeros first, and the padding is attended."""

    def __init__(self, text_dim: int, dim: int, length: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.length = length
        self.up = linear.column(text_dim, dim, quant, f"{prefix}.up")
        self.down = linear.row(dim, dim, quant, f"{prefix}.down")

    def forward(self, text: Tensor) -> Tensor:
        """Take raw states ``[B, T, text_dim]``, T at most ``length``; return ``[B, length, D]``."""
        padded = F.pad(text, (0, 0, 0, self.length - text.shape[1]))
        return self.down(fused_ops.linear_gelu(self.up, padded))


class TimeEmbedding(nn.Module):
    """Embed timesteps: sinusoids in float64, then two linears."""

    def __init__(self, freq_dim: int, dim: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.up = linear.column(freq_dim, dim, quant, f"{prefix}.up")
        self.down = linear.row(dim, dim, quant, f"{prefix}.down")

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the embedding ``[..., D]`` of timesteps of any shape."""
        return self.down(F.silu(self.up(timestep_embedding(timestep, self.freq_dim).to(dtype))))


class TimeProjection(nn.Module):
    """The six modulation vectors that a timestep gives every block."""

    def __init__(self, dim: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.linear = linear.column(dim, 6 * dim, quant, f"{prefix}.linear", gather=True)

    def forward(self, embedding: Tensor) -> Tensor:
        """Take ``[..., D]``; return ``[..., 6, D]``: shift, scale, gate of attention, then of the feed-forward."""
        return self.linear(F.silu(embedding)).unflatten(-1, (6, -1))


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Return ``[..., dim]`` in float64: cosines of the geometric frequencies, then sines."""
    half = dim // 2
    powers = torch.arange(half, dtype=torch.float64, device=timestep.device) / -half
    angles = timestep.double().unsqueeze(-1) * torch.exp(powers * math.log(MAX_PERIOD))
    return torch.cat((angles.cos(), angles.sin()), -1)


class GatedConv(nn.Module):
    """A gated feed-forward whose linears see a window of neighbouring tokens.

    The convolutions are linears over unfolded windows, so that they are split over ranks and quantized as all others.
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

    The taps of a channel lie together, as in a convolution's weight ``[out, in, kernel]`` flattened to a matrix.
    """
    if not x_BSD.shape[1]:
        return x_BSD.new_empty(x_BSD.shape[0], 0, x_BSD.shape[2] * kernel)
    margin = kernel // 2
    return F.pad(x_BSD, (0, 0, margin, margin)).unfold(1, kernel, 1).flatten(-2)
