"""Fused operations between the matrix products of a fusion block.

Each operation has two forms: plain PyTorch (``*_torch``), and on CUDA a Triton kernel
(:mod:`~port_kit.models.wan.transformer.kernels`) that reads its inputs once and rounds its results once. Separate
kernels for norms, modulation, residuals, rotation and casts would be bound by memory bandwidth. A result that a linear
with eight-bit weights reads is quantized too (:mod:`~port_kit.parallel.fp8_rows`).

Shape suffixes: B batch, S tokens of a stream, D width, G distinct timesteps of a stream (1 or 2), R rotated pairs of
a head, K inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from port_kit.models.wan.transformer.rope import rotate
from port_kit.parallel.fp8_rows import Rows, quantize_rows, takes_rows
from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase

require("fused_gelu")


#: One or two tensors whose sum is the value; two if the all-reduce of two ranks is left to the next operation.
PartialSums = tuple[Tensor, ...]

#: Numbers of consecutive tokens that share a timestep, one per distinct timestep.
Segments = tuple[int, ...]


class ScaleShift(NamedTuple):
    """Factor and offset applied to the result of a layer norm.

    Attributes:
        scale: ``[G, B, D]``, or ``[D]`` for all tokens.
        shift: the same shape as ``scale``.
    """

    scale: Tensor
    shift: Tensor


class Residual(NamedTuple):
    """Output of a sub-layer that is added to the residual stream.

    Attributes:
        partial_sums: tensors ``[B, S, D]``.
        gate: factor ``[G, B, D]``; None for 1.
    """

    partial_sums: PartialSums
    gate: Tensor | None


class RMSScale(NamedTuple):
    """Learned scale of an RMS norm whose width may be divided over ranks.

    Attributes:
        weight: ``[D]``, the part of this rank.
        width: of all ranks together.
        eps: added to the mean square.
    """

    weight: Tensor
    width: int
    eps: float


def norm(
    x_BSD: Tensor,
    scale_shift: ScaleShift,
    timestep_segments: Segments,
    eps: float,
    reader: nn.Module | None = None,
) -> Any:
    """Return the layer norm of ``x``, times the scale, plus the shift, quantized if the reader takes that."""
    return add_norms(x_BSD, None, (scale_shift,), timestep_segments, eps, (reader,))[0]


def add(x_BSD: Tensor, residual: Residual, timestep_segments: Segments) -> Tensor:
    """Return ``x + gate * y``, each segment of tokens with the gate of its timestep."""
    return add_norms(x_BSD, residual, (), timestep_segments, 0.0)[0]


def add_norms(
    x: Tensor,
    residual: Residual | None,
    scale_shifts: Sequence[ScaleShift],
    timestep_segments: Segments,
    eps: float,
    readers: Sequence[nn.Module | None] = (),
) -> tuple[Any, ...]:
    """Return ``x + gate * y`` if a residual is given, then one layer norm of it per scale and shift.

    Args:
        x: tokens ``[B, S, D]``.
        residual: ``y`` and its gate.
        scale_shifts: at most two.
        timestep_segments: numbers of tokens per timestep; G numbers.
        eps: of the norms.
        readers: linears that read the norms. The norm for one that takes quantized rows is quantized.
    """
    if not x.is_cuda:
        return add_norms_torch(x, residual, scale_shifts, timestep_segments, eps, readers)
    from port_kit.models.wan.transformer import kernels

    partial_sums, gate = residual or ((), None)
    y = [part.contiguous() for part in partial_sums]
    gate = None if gate is None else _per_sample(gate, x)
    vectors = [_vectors(scale_shift, x) for scale_shift in scale_shifts]
    quantized = _quantized(readers, len(scale_shifts))
    return kernels.add_norms(x.contiguous(), y, gate, vectors, timestep_segments[0], eps, quantized)


def add_norms_torch(
    x: Tensor,
    residual: Residual | None,
    scale_shifts: Sequence[ScaleShift],
    timestep_segments: Segments,
    eps: float,
    readers: Sequence[nn.Module | None] = (),
) -> tuple[Any, ...]:
    """Return the result of :func:`add_norms` in plain PyTorch."""
    total = x
    if residual is not None:
        parts, gate = residual
        y = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        total = x + y if gate is None else _gated(x, y, gate, timestep_segments)
    normed = (_norm(total, scale_shift, timestep_segments, eps) for scale_shift in scale_shifts)
    quantized = _quantized(readers, len(scale_shifts))
    rows = (quantize_rows(one) if eight_bits else one for one, eight_bits in zip(normed, quantized, strict=True))
    return tuple(rows) if residual is None else (total, *rows)


def rms_norm(
    x_BSD: Tensor, scale: RMSScale, squares_BS: Tensor | None, rope_1SR2: Tensor | None, *, keep_unrotated: bool
) -> tuple[Tensor, ...]:
    """Return the RMS norm of each token if ``keep_unrotated``, then the norm with the pairs of all heads rotated.

    Args:
        x_BSD: this rank's part of the width; may be a slice of a fused projection.
        scale: of this rank's part.
        squares_BS: float32 sums of squares over all ranks; None if ``x`` has the full width.
        rope_1SR2: table of the tokens (:mod:`~port_kit.models.wan.transformer.rope`), or None for no rotation.
        keep_unrotated: return the norm without rotation too.
    """
    if not x_BSD.is_cuda:
        return rms_norm_torch(x_BSD, scale, squares_BS, rope_1SR2, keep_unrotated=keep_unrotated)
    from port_kit.models.wan.transformer import kernels

    table = None if rope_1SR2 is None else rope_1SR2[0].contiguous()
    return kernels.rms_rope(_rows(x_BSD), scale, squares_BS, table, keep_unrotated=keep_unrotated)


def rms_norm_torch(
    x_BSD: Tensor, scale: RMSScale, squares_BS: Tensor | None, rope_1SR2: Tensor | None, *, keep_unrotated: bool
) -> tuple[Tensor, ...]:
    """Return the result of :func:`rms_norm` in plain PyTorch."""
    wide = x_BSD.float()
    squares = wide.square().sum(-1) if squares_BS is None else squares_BS
    normed = (wide * torch.rsqrt(squares / scale.width + scale.eps).unsqueeze(-1) * scale.weight).to(x_BSD.dtype)
    results = (normed,) if keep_unrotated else ()
    if rope_1SR2 is None:
        return results
    heads = normed.unflatten(-1, (-1, 2 * rope_1SR2.shape[2]))
    return *results, rotate(heads, rope_1SR2).flatten(-2)


def linear_gelu(layer: LinearBase, x_BSK: Any, reader: nn.Module | None = None) -> Any:
    """Return the tanh-approximated GELU of a linear's output, quantized if the reader takes that.

    On CUDA the matrix product computes it, so that the widest tensor of the model is not read again. That requires a
    linear that is only a matrix and a bias: not quantized and not adapted by a LoRA.
    """
    if reader is not None and takes_rows(reader):
        return quantize_rows(layer(x_BSK), gelu=True)
    if not (_is_plain(layer) and x_BSK.is_cuda):
        return F.gelu(layer(x_BSK), approximate="tanh")
    # cuBLASLt applies the tanh approximation to the float32 sums.
    out = torch._addmm_activation(layer.bias, x_BSK.flatten(0, -2), layer.weight.t(), use_gelu=True)
    return out.unflatten(0, x_BSK.shape[:-1])


def add_heads(x_BSD: Tensor, y_BSD: Tensor, reader: nn.Module) -> Rows:
    """Return the sum of the results of two attentions, quantized if the reader takes that."""
    return quantize_rows(x_BSD, y_BSD) if takes_rows(reader) else x_BSD + y_BSD


def _is_plain(layer: LinearBase) -> bool:
    from vllm.model_executor.layers.linear import ColumnParallelLinear, UnquantizedLinearMethod

    plain = type(layer) is ColumnParallelLinear and type(layer.quant_method) is UnquantizedLinearMethod
    return plain and layer.bias is not None and not layer.gather_output


def _quantized(readers: Sequence[nn.Module | None], norms: int) -> list[bool]:
    return [reader is not None and takes_rows(reader) for reader in readers or [None] * norms]


def _norm(x_BSD: Tensor, scale_shift: ScaleShift, timestep_segments: Segments, eps: float) -> Tensor:
    shape = x_BSD.shape[-1:]
    if scale_shift.scale.dim() == 1:
        return F.layer_norm(x_BSD, shape, scale_shift.scale, scale_shift.shift, eps)
    return _modulate(F.layer_norm(x_BSD, shape, eps=eps), scale_shift, timestep_segments)


def _modulate(x_BSD: Tensor, scale_shift: ScaleShift, timestep_segments: Segments) -> Tensor:
    rows = zip(
        x_BSD.split(timestep_segments, 1), scale_shift.scale.unsqueeze(-2), scale_shift.shift.unsqueeze(-2), strict=True
    )
    return _cat([torch.addcmul(shift, x, scale) for x, scale, shift in rows])


def _gated(x_BSD: Tensor, y_BSD: Tensor, gate_GBD: Tensor, timestep_segments: Segments) -> Tensor:
    rows = zip(
        x_BSD.split(timestep_segments, 1), y_BSD.split(timestep_segments, 1), gate_GBD.unsqueeze(-2), strict=True
    )
    return _cat([torch.addcmul(x, y, gate) for x, y, gate in rows])


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _rows(x_BSD: Tensor) -> Tensor:
    """Return ``x`` with one stride between all tokens; a slice of a fused projection is not copied."""
    evenly = x_BSD.shape[0] == 1 or x_BSD.stride(0) == x_BSD.stride(1) * x_BSD.shape[1]
    return x_BSD if evenly and x_BSD.stride(2) == 1 else x_BSD.contiguous()


def _vectors(scale_shift: ScaleShift, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and shift as ``[G, B, D]``; a vector for all tokens becomes a view with stride 0."""
    scale, shift = (v.expand(2, x_BSD.shape[0], -1) if v.dim() == 1 else _per_sample(v, x_BSD) for v in scale_shift)
    return scale, shift


def _per_sample(vector_GBD: Tensor, x_BSD: Tensor) -> Tensor:
    """Return vectors of one timestep for all samples as a view with stride 0."""
    return vector_GBD.expand(-1, x_BSD.shape[0], -1)
