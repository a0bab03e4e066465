"""The steps between the matrix products of a fusion block, each in one pass over memory where there is a GPU.

Each function has two forms: plain PyTorch (``plain_*``), and on CUDA a Triton kernel
(:mod:`~port_kit.models.wan.transformer.kernels`) that reads its inputs once and rounds its results once. Separate
kernels for norms, modulation, residuals, rotation and casts are bound by memory bandwidth.

Shape suffixes: B batch, S tokens of a stream, D width, G distinct timesteps of a stream (1 or 2), R rotated pairs of
a head, K inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from port_kit.models.wan.transformer.rope import rotate

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase


#: One tensor, or two of which the sum is meant: of ranks that computed a part each.
PartialSums = tuple[Tensor, ...]


class ScaleShift(NamedTuple):
    """What a layer norm's result is multiplied with, and what is added to it.

    Attributes:
        scale: ``[G, B, D]``, or ``[D]`` for all tokens alike.
        shift: as ``scale``.
    """

    scale: Tensor
    shift: Tensor


def norm(x_BSD: Tensor, scale_shift: ScaleShift, timestep_segments: tuple[int, ...], eps: float) -> Tensor:
    """Return the layer norm of ``x``, times the scale, plus the shift.

    Args:
        x_BSD: tokens.
        scale_shift: vectors of each of the G timesteps.
        timestep_segments: how many tokens, in order, have each timestep; G numbers.
        eps: of the norm.
    """
    return _add_norms(x_BSD, (), None, (scale_shift,), timestep_segments, eps)[0]


def add(x_BSD: Tensor, y_BSD: PartialSums, gate_GBD: Tensor, timestep_segments: tuple[int, ...]) -> Tensor:
    """Return ``x + gate * y``, each run of tokens with the gate of its timestep."""
    return _add_norms(x_BSD, y_BSD, gate_GBD, (), timestep_segments, 0.0)[0]


def add_norms(
    x_BSD: Tensor,
    y_BSD: PartialSums,
    gate_GBD: Tensor | None,
    scale_shifts: Sequence[ScaleShift],
    timestep_segments: tuple[int, ...],
    eps: float,
) -> tuple[Tensor, ...]:
    """Return ``x + gate * y`` (a gate of None is 1), and one layer norm of it per scale and shift (at most 2)."""
    return _add_norms(x_BSD, y_BSD, gate_GBD, scale_shifts, timestep_segments, eps)


def _add_norms(
    x_BSD: Tensor,
    y_BSD: PartialSums,
    gate_GBD: Tensor | None,
    scale_shifts: Sequence[ScaleShift],
    timestep_segments: tuple[int, ...],
    eps: float,
) -> tuple[Tensor, ...]:
    if not x_BSD.is_cuda:
        return add_norms_torch(x_BSD, y_BSD, gate_GBD, scale_shifts, timestep_segments, eps)
    from port_kit.models.wan.transformer import kernels

    y = [part.contiguous() for part in y_BSD]
    vectors = [_vectors(scale_shift, x_BSD) for scale_shift in scale_shifts]
    return kernels.add_norms(x_BSD.contiguous(), y, gate_GBD, vectors, timestep_segments[0], eps)


def add_norms_torch(
    x_BSD: Tensor,
    y_BSD: PartialSums,
    gate_GBD: Tensor | None,
    scale_shifts: Sequence[ScaleShift],
    timestep_segments: tuple[int, ...],
    eps: float,
) -> tuple[Tensor, ...]:
    """Return the sum, where there is a ``y``, and the norms, in plain PyTorch."""
    if not y_BSD:
        return tuple(_norm(x_BSD, scale_shift, timestep_segments, eps) for scale_shift in scale_shifts)
    y = y_BSD[0] if len(y_BSD) == 1 else y_BSD[0] + y_BSD[1]
    total = x_BSD + y if gate_GBD is None else _gated(x_BSD, y, gate_GBD, timestep_segments)
    return total, *(_norm(total, scale_shift, timestep_segments, eps) for scale_shift in scale_shifts)


def rms_norm(
    x_BSD: Tensor,
    weight_D: Tensor,
    squares_BS: Tensor | None,
    rope_1SR2: Tensor | None,
    *,
    width: int,
    eps: float,
    plain: bool,
) -> tuple[Tensor, ...]:
    """Return the RMS norm of each token, and the same with the pairs of all heads rotated; the former if ``plain``.

    Args:
        x_BSD: this rank's part of the width; a slice of a fused projection need not be copied.
        weight_D: of this rank's part.
        squares_BS: float32 sums of squares over the whole width, or None where ``x`` has all of it.
        rope_1SR2: table of the tokens (:mod:`~port_kit.models.wan.transformer.rope`), or None for no rotation.
        width: of all ranks together.
        eps: of the norm.
        plain: whether the norm itself is wanted.
    """
    if not x_BSD.is_cuda:
        return rms_norm_torch(x_BSD, weight_D, squares_BS, rope_1SR2, width=width, eps=eps, plain=plain)
    from port_kit.models.wan.transformer import kernels

    table = None if rope_1SR2 is None else rope_1SR2[0].contiguous()
    return kernels.rms_rope(_rows(x_BSD), weight_D, squares_BS, table, width=width, eps=eps, plain=plain)


def rms_norm_torch(
    x_BSD: Tensor,
    weight_D: Tensor,
    squares_BS: Tensor | None,
    rope_1SR2: Tensor | None,
    *,
    width: int,
    eps: float,
    plain: bool,
) -> tuple[Tensor, ...]:
    """Return what :func:`rms_norm` does, in plain PyTorch."""
    wide = x_BSD.float()
    squares = wide.square().sum(-1) if squares_BS is None else squares_BS
    normed = (wide * torch.rsqrt(squares / width + eps).unsqueeze(-1)).to(x_BSD.dtype) * weight_D
    results = (normed,) if plain else ()
    if rope_1SR2 is None:
        return results
    heads = normed.unflatten(-1, (-1, 2 * rope_1SR2.shape[2]))
    return *results, rotate(heads, rope_1SR2).flatten(-2)


def square_sums(x_BSD: Tensor) -> Tensor:
    """Return the sums of squares of this rank's part of each token, float32 ``[B, S]``."""
    if x_BSD.is_cuda:
        from port_kit.models.wan.transformer import kernels

        return kernels.square_sums(_rows(x_BSD))
    return torch.linalg.vector_norm(x_BSD, dim=-1, dtype=torch.float32).square()


def linear_gelu(layer: LinearBase, x_BSK: Tensor) -> Tensor:
    """Return the tanh-approximated GELU of a linear's output.

    On CUDA it is part of the matrix product, which spares the widest tensor of the model a pass; unless the linear is
    quantized, adapted by a LoRA, or otherwise more than a matrix and a bias.
    """
    if not (x_BSK.is_cuda and _is_plain(layer)):
        return F.gelu(layer(x_BSK), approximate="tanh")
    # The epilogue of cuBLASLt is the tanh approximation, of the float32 sums.
    out = torch._addmm_activation(layer.bias, x_BSK.flatten(0, -2), layer.weight.t(), use_gelu=True)
    return out.unflatten(0, x_BSK.shape[:-1])


def _is_plain(layer: LinearBase) -> bool:
    from vllm.model_executor.layers.linear import ColumnParallelLinear, UnquantizedLinearMethod

    plain = type(layer) is ColumnParallelLinear and type(layer.quant_method) is UnquantizedLinearMethod
    return plain and layer.bias is not None and not layer.gather_output


def _norm(x_BSD: Tensor, scale_shift: ScaleShift, timestep_segments: tuple[int, ...], eps: float) -> Tensor:
    shape = x_BSD.shape[-1:]
    if scale_shift.scale.dim() == 1:
        return F.layer_norm(x_BSD, shape, scale_shift.scale, scale_shift.shift, eps)
    return _modulate(F.layer_norm(x_BSD, shape, eps=eps), scale_shift, timestep_segments)


def _modulate(x_BSD: Tensor, scale_shift: ScaleShift, timestep_segments: tuple[int, ...]) -> Tensor:
    rows = zip(
        x_BSD.split(timestep_segments, 1), scale_shift.scale.unsqueeze(-2), scale_shift.shift.unsqueeze(-2), strict=True
    )
    return _joined([torch.addcmul(shift, x, scale) for x, scale, shift in rows])


def _gated(x_BSD: Tensor, y_BSD: Tensor, gate_GBD: Tensor, timestep_segments: tuple[int, ...]) -> Tensor:
    rows = zip(
        x_BSD.split(timestep_segments, 1), y_BSD.split(timestep_segments, 1), gate_GBD.unsqueeze(-2), strict=True
    )
    return _joined([torch.addcmul(x, y, gate) for x, y, gate in rows])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _rows(x_BSD: Tensor) -> Tensor:
    """Return ``x`` with one stride from each token to the next, as a slice of a fused projection has."""
    evenly = x_BSD.shape[0] == 1 or x_BSD.stride(0) == x_BSD.stride(1) * x_BSD.shape[1]
    return x_BSD if evenly and x_BSD.stride(2) == 1 else x_BSD.contiguous()


def _vectors(scale_shift: ScaleShift, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as ``[G, B, D]`` for a kernel; one vector for all as a view of stride 0."""
    scale, shift = (v.expand(2, x_BSD.shape[0], -1) if v.dim() == 1 else v for v in scale_shift)
    return scale, shift
