"""Triton kernels of the fusion transformer's memory-bound operations, called by :mod:`.fused_ops`.

One program computes one token: it reads the row once, computes in float32 and writes each result once. Rows are
padded to a power of two in registers only. Each kernel has a plain PyTorch equivalent in :mod:`.fused_ops`.

Shape suffixes: B batch, S tokens, D width (this rank's part if it is divided), G distinct timesteps, R rotated pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from port_kit.parallel.fp8_kernels import empty_rows, store_quantized
from port_kit.parallel.fp8_rows import QuantizedRows, Rows

if TYPE_CHECKING:
    from port_kit.models.wan.transformer.fused_ops import RMSScale

#: Values of a row per thread. The fastest of 4, 8, 16, 32 and 64 on an H200.
VALUES = {"norm": 64, "add": 32, "rms": 32}


def add_norms(
    x_BSD: Tensor,
    partial_sums_BSD: Sequence[Tensor],
    gate_GBD: Tensor | None,
    scale_shifts: list[tuple[Tensor, Tensor]],
    first_segment: int,
    eps: float,
    quantized: Sequence[bool],
) -> tuple[Rows, ...]:
    """Return ``x + gate * y`` if ``y`` is given, and up to two layer norms of it, each with scale and shift.

    Args:
        x_BSD: contiguous.
        partial_sums_BSD: at most two contiguous tensors whose sum is ``y``.
        gate_GBD: any strides except the last, or None for 1.
        scale_shifts: scale and shift of each norm, both ``[G, B, D]``; G and B may have stride 0.
        first_segment: number of tokens per sample that use row 0 of G; the others use row 1.
        eps: of the norms.
        quantized: for each norm, whether it is quantized.
    """
    width, block, warps = _row(x_BSD, VALUES["add" if partial_sums_BSD else "norm"])
    total = torch.empty_like(x_BSD) if partial_sums_BSD else x_BSD
    normed = [QuantizedRows(*empty_rows(x_BSD)) if eight_bits else torch.empty_like(x_BSD) for eight_bits in quantized]
    vectors = [vector for scale_shift in scale_shifts for vector in scale_shift]
    # the kernel requires all pointers; it does not read the unused ones
    vectors += [x_BSD] * (4 - len(vectors))
    gate = x_BSD if gate_GBD is None else gate_GBD
    values = [rows.values if isinstance(rows, QuantizedRows) else rows for rows in normed]
    scales = [rows.scales if isinstance(rows, QuantizedRows) else x_BSD for rows in normed]
    unused = [x_BSD] * (2 - len(normed))
    rows = x_BSD.shape[0] * x_BSD.shape[1]
    if rows:
        _add_norms[(rows,)](
            x_BSD,
            *[*partial_sums_BSD, x_BSD, x_BSD][:2],
            total,
            *values,
            *unused,
            *scales,
            *unused,
            gate,
            *vectors,
            *(stride for vector in (gate, *vectors) for stride in vector.stride()[:2]),
            x_BSD.shape[1],
            first_segment,
            eps,
            D=width,
            BLOCK=block,
            PARTIAL_SUMS=len(partial_sums_BSD),
            GATED=gate_GBD is not None,
            NORMS=len(scale_shifts),
            QUANTIZED0=any(quantized[:1]),
            QUANTIZED1=any(quantized[1:]),
            num_warps=warps,
        )
    return (total, *normed) if partial_sums_BSD else tuple(normed)


def rms_rope(
    x_BSD: Tensor, scale: RMSScale, squares_BS: Tensor | None, rope_SR2: Tensor | None, *, keep_unrotated: bool
) -> tuple[Tensor, ...]:
    """Return the RMS norm of each row if ``keep_unrotated``, then the norm with the pairs of every head rotated.

    Args:
        x_BSD: rows with one stride, such as a slice of a fused projection.
        scale: of this rank's part of the width.
        squares_BS: float32 sums of squares over all ranks; None if a row has the full width.
        rope_SR2: contiguous float32 cosines and sines of one head's pairs, or None for no rotation.
        keep_unrotated: return the norm without rotation too.
    """
    local, block, warps = _row(x_BSD, VALUES["rms"])
    results = [x_BSD.new_empty(x_BSD.shape) for _ in range(keep_unrotated + (rope_SR2 is not None))]
    rows = x_BSD.shape[0] * x_BSD.shape[1]
    if rows:
        _rms_rope[(rows,)](
            x_BSD,
            scale.weight,
            x_BSD if squares_BS is None else squares_BS,
            x_BSD if rope_SR2 is None else rope_SR2,
            results[0],
            results[-1],
            x_BSD.stride(1),
            x_BSD.shape[1],
            scale.width,
            scale.eps,
            D=local,
            BLOCK=block,
            HEAD=1 if rope_SR2 is None else 2 * rope_SR2.shape[1],
            SUMMED=squares_BS is not None,
            UNROTATED=keep_unrotated,
            ROTATED=rope_SR2 is not None,
            num_warps=warps,
        )
    return tuple(results)


def _row(x_BSD: Tensor, values: int) -> tuple[int, int, int]:
    """Return the width of a row, the block size that holds it, and the number of warps for ``values`` per thread."""
    width = x_BSD.shape[-1]
    block = triton.next_power_of_2(width)
    return width, block, min(max(block // (32 * values), 1), 32)


@triton.jit
def _add_norms(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    z_ptr: tl.tensor,
    total_ptr: tl.tensor,
    normed0_ptr: tl.tensor,
    normed1_ptr: tl.tensor,
    row_scales0_ptr: tl.tensor,
    row_scales1_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    scale0_ptr: tl.tensor,
    shift0_ptr: tl.tensor,
    scale1_ptr: tl.tensor,
    shift1_ptr: tl.tensor,
    gate_g: tl.tensor,
    gate_b: tl.tensor,
    scale0_g: tl.tensor,
    scale0_b: tl.tensor,
    shift0_g: tl.tensor,
    shift0_b: tl.tensor,
    scale1_g: tl.tensor,
    scale1_b: tl.tensor,
    shift1_g: tl.tensor,
    shift1_b: tl.tensor,
    tokens: tl.tensor,
    first_segment: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIAL_SUMS: tl.constexpr,
    GATED: tl.constexpr,
    NORMS: tl.constexpr,
    QUANTIZED0: tl.constexpr,
    QUANTIZED1: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    b = row // tokens
    g = ((row % tokens) >= first_segment).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    # issue all loads before the first reduction waits for one
    x = tl.load(x_ptr + row * D + at, mask=inside, other=0.0)
    if PARTIAL_SUMS > 0:
        y = tl.load(y_ptr + row * D + at, mask=inside, other=0.0)
    if PARTIAL_SUMS > 1:
        z = tl.load(z_ptr + row * D + at, mask=inside, other=0.0)
    if GATED:
        gate = tl.load(gate_ptr + g * gate_g + b * gate_b + at, mask=inside, other=0.0)
    if NORMS > 0:
        scale0 = tl.load(scale0_ptr + g * scale0_g + b * scale0_b + at, mask=inside, other=0.0)
        shift0 = tl.load(shift0_ptr + g * shift0_g + b * shift0_b + at, mask=inside, other=0.0)
    if NORMS > 1:
        scale1 = tl.load(scale1_ptr + g * scale1_g + b * scale1_b + at, mask=inside, other=0.0)
        shift1 = tl.load(shift1_ptr + g * shift1_g + b * shift1_b + at, mask=inside, other=0.0)
    x = x.to(tl.float32)
    if PARTIAL_SUMS > 0:
        y = y.to(tl.float32)
        if PARTIAL_SUMS > 1:
            y += z.to(tl.float32)
        if GATED:
            y *= gate.to(tl.float32)
        total = (x + y).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * D + at, total, mask=inside)
        x = total.to(tl.float32)
    if NORMS > 0:
        centred = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
        x = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
        normed = x * scale0.to(tl.float32) + shift0.to(tl.float32)
        if QUANTIZED0:
            store_quantized(normed, row, at, normed0_ptr, row_scales0_ptr, D)
        else:
            tl.store(normed0_ptr + row * D + at, normed.to(normed0_ptr.dtype.element_ty), mask=inside)
    if NORMS > 1:
        normed = x * scale1.to(tl.float32) + shift1.to(tl.float32)
        if QUANTIZED1:
            store_quantized(normed, row, at, normed1_ptr, row_scales1_ptr, D)
        else:
            tl.store(normed1_ptr + row * D + at, normed.to(normed1_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rms_rope(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    squares_ptr: tl.tensor,
    rope_ptr: tl.tensor,
    unrotated_ptr: tl.tensor,
    rotated_ptr: tl.tensor,
    row_stride: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    SUMMED: tl.constexpr,
    UNROTATED: tl.constexpr,
    ROTATED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    # issue all loads before the reduction waits for one
    x = tl.load(x_ptr + row * row_stride + at, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    if ROTATED:
        cos_sin = tl.load(rope_ptr + (row % tokens) * HEAD + at % HEAD, mask=inside, other=0.0)
    x = x.to(tl.float32)
    squares = tl.load(squares_ptr + row) if SUMMED else tl.sum(x * x, 0)
    x = x * tl.rsqrt(squares / width + eps) * weight.to(tl.float32)
    if UNROTATED:
        tl.store(unrotated_ptr + row * D + at, x.to(unrotated_ptr.dtype.element_ty), mask=inside)
    if ROTATED:
        cos, sin = tl.split(tl.reshape(cos_sin, (BLOCK // 2, 2)))
        even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
        rotated = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK,))
        tl.store(rotated_ptr + row * D + at, rotated.to(rotated_ptr.dtype.element_ty), mask=inside)
