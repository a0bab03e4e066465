"""Triton kernels of :mod:`~port_kit.parallel.norm`. One program computes one row, in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Values of a row per thread. The fastest of 4, 8, 16, 32 and 64 on an H200.
VALUES = 32


def square_sums(rows: Tensor) -> Tensor:
    """Return each row's sum of squares, float32 ``[R]``.

    Args:
        rows: ``[R, D]``; rows are contiguous and have any stride.
    """
    sums = rows.new_empty(rows.shape[0], dtype=torch.float32)
    if sums.numel():
        block, warps = _block(rows)
        _square_sums[(len(sums),)](rows, sums, rows.stride(0), D=rows.shape[1], BLOCK=block, num_warps=warps)
    return sums


def rms_norm(rows: Tensor, sums: Tensor, weight: Tensor | None, width: int, eps: float) -> Tensor:
    """Return rows divided by their root mean square and multiplied by ``weight``, ``[R, D]``.

    Args:
        rows: ``[R, D]``; rows are contiguous and have any stride.
        sums: float32 ``[R]``, sums of squares over ``width`` values.
        weight: ``[D]``, or None for 1.
        width: number of values per row over all ranks.
        eps: added to the mean square.
    """
    normed = rows.new_empty(rows.shape)
    if normed.numel():
        block, warps = _block(rows)
        factors = rows if weight is None else weight
        _rms_norm[(len(rows),)](
            rows,
            sums,
            factors,
            normed,
            rows.stride(0),
            width,
            eps,
            D=rows.shape[1],
            BLOCK=block,
            WEIGHTED=weight is not None,
            num_warps=warps,
        )
    return normed


def _block(rows: Tensor) -> tuple[int, int]:
    """Return the size of a block that holds a row, and the number of its warps."""
    block = triton.next_power_of_2(rows.shape[1])
    return block, min(max(block // (32 * VALUES), 1), 32)


@triton.jit
def _square_sums(
    x_ptr: tl.tensor, sums_ptr: tl.tensor, row_stride: tl.tensor, D: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * row_stride + at, mask=at < D, other=0.0).to(tl.float32)
    tl.store(sums_ptr + row, tl.sum(x * x, 0))


@triton.jit
def _rms_norm(
    x_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    row_stride: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    x = tl.load(x_ptr + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.load(sums_ptr + row) / width + eps)
    if WEIGHTED:
        x *= tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row * D + at, x.to(normed_ptr.dtype.element_ty), mask=inside)
