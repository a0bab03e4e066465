"""What the blocks and stems of the fusion transformer are made of, attention aside.

Shape suffixes: B batch, S tokens of a stream, D width, G distinct timesteps of a stream.

The dtypes are those of the original under bfloat16: statistics of norms and angles of timesteps in float32 or wider,
everything else in the dtype of the weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from port_kit.parallel import linear

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

#: Periods of the timestep's sinusoids grow geometrically up to this.
MAX_PERIOD = 10000.0


class FullWidthRMSNorm(nn.Module):
    """RMS norm over the width of all heads together, exact under tensor parallelism.

    Each rank holds the part of the weight that belongs to its heads; the square sums are added up over the ranks.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.ranks = get_tensor_model_parallel_world_size()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim // self.ranks), requires_grad=False)
        self.weight.weight_loader = _load_own_part
        self.weight.full_shape = (dim,)  # what a checkpoint has of it, for whoever checks before loading

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Normalise ``x``, whose last dimension is this rank's part of the width."""
        wide = x_BSD.float()
        mean = wide.square().sum(-1, keepdim=True)
        if self.ranks > 1:
            mean = tensor_model_parallel_all_reduce(mean)
        normed = wide * torch.rsqrt(mean / self.dim + self.eps)
        return normed.to(x_BSD.dtype) * self.weight


def _load_own_part(parameter: nn.Parameter, loaded: Tensor) -> None:
    """Copy this rank's part of a full-width weight."""
    size = parameter.shape[0]
    parameter.data.copy_(loaded.narrow(0, get_tensor_model_parallel_rank() * size, size))


class Modulation(NamedTuple):
    """Shift, scale and gate of one sub-layer: one vector for each of a stream's distinct timesteps.

    Attributes:
        shift: ``[G, B, 1, D]``.
        scale: ``[G, B, 1, D]``.
        gate: ``[G, B, 1, D]``.
        runs: how many of this rank's tokens, in order, have each timestep; G numbers.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor
    runs: tuple[int, ...]

    def norm(self, x_BSD: Tensor, eps: float) -> Tensor:
        """Return the layer norm of ``x`` (no weights), scaled and shifted."""
        return modulate(F.layer_norm(x_BSD, x_BSD.shape[-1:], eps=eps), self.shift, self.scale, self.runs)

    def add(self, x_BSD: Tensor, y_BSD: Tensor) -> Tensor:
        """Return ``x + gate * y``."""
        if len(self.runs) == 1:
            return torch.addcmul(x_BSD, y_BSD, self.gate[0])
        parts = zip(x_BSD.split(self.runs, 1), y_BSD.split(self.runs, 1), self.gate, strict=True)
        return torch.cat([torch.addcmul(x, y, gate) for x, y, gate in parts], 1)


def modulate(x_BSD: Tensor, shift_GB1D: Tensor, scale_GB1D: Tensor, runs: tuple[int, ...]) -> Tensor:
    """Return ``x * (1 + scale) + shift``, each run of tokens with the vectors of its own timestep."""
    scale = 1 + scale_GB1D
    if len(runs) == 1:
        return torch.addcmul(shift_GB1D[0], x_BSD, scale[0])
    parts = zip(x_BSD.split(runs, 1), shift_GB1D, scale, strict=True)
    return torch.cat([torch.addcmul(shift, part, factor) for part, shift, factor in parts], 1)


class FeedForward(nn.Module):
    """Feed-forward sub-layer: two linears with a tanh-approximated GELU between them, modulated, added to its input."""

    def __init__(self, dim: int, hidden: int, eps: float, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.eps = eps
        self.up = linear.column(dim, hidden, quant, f"{prefix}.up")
        self.down = linear.row(hidden, dim, quant, f"{prefix}.down")

    def forward(self, x_BSD: Tensor, modulation: Modulation) -> Tensor:
        """Return the residual stream ``[B, S, D]`` after this sub-layer."""
        y = F.gelu(self.up(modulation.norm(x_BSD, self.eps)), approximate="tanh")
        return modulation.add(x_BSD, self.down(y))


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
        return self.down(F.gelu(self.up(padded), approximate="tanh"))


class TimeEmbedding(nn.Module):
    """Embed timesteps: sinusoids in float64, then two linears."""

    def __init__(self, freq_dim: int, dim: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.up = linear.column(freq_dim, dim, quant, f"{prefix}.up")
        self.down = linear.row(dim, dim, quant, f"{prefix}.down")

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the embedding ``[..., D]`` of timesteps of any shape."""
        return self.down(F.silu(self.up(sinusoids(timestep, self.freq_dim).to(dtype))))


class TimeProjection(nn.Module):
    """The six modulation vectors that a timestep gives every block."""

    def __init__(self, dim: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.linear = linear.column(dim, 6 * dim, quant, f"{prefix}.linear", gather=True)

    def forward(self, embedding: Tensor) -> Tensor:
        """Take ``[..., D]``; return ``[..., 6, D]``: shift, scale, gate of attention, then of the feed-forward."""
        return self.linear(F.silu(embedding)).unflatten(-1, (6, -1))


def sinusoids(timestep: Tensor, dim: int) -> Tensor:
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
        gate, up = self.gate_up(windows(x_BSD, self.kernel)).chunk(2, -1)
        return self.down(windows(F.silu(gate) * up, self.kernel))


def windows(x_BSD: Tensor, kernel: int) -> Tensor:
    """Return every token's window of ``kernel`` tokens, zero beyond the ends, ``[B, S, D * kernel]``.

    The taps of a channel lie together, as in a convolution's weight ``[out, in, kernel]`` flattened to a matrix.
    """
    if not x_BSD.shape[1]:
        return x_BSD.new_empty(x_BSD.shape[0], 0, x_BSD.shape[2] * kernel)
    margin = kernel // 2
    return F.pad(x_BSD, (0, 0, margin, margin)).unfold(1, kernel, 1).flatten(-2)
