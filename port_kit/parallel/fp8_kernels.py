"""Triton kernels that quantize to eight-bit floats: rows for linears, heads for attention.

The scale is the largest magnitude divided by the largest eight-bit value. Values are read once, or twice for heads.

Shape suffixes: R rows, D width, B batch, S tokens, N heads, H head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_FP8_MAX = tl.constexpr(torch.finfo(torch.float8_e4m3fn).max)
#: As in :mod:`~port_kit.parallel.fp8_rows`.
_SMALLEST = tl.constexpr(1e-12)
#: Of the results; Triton's interpreter rounds to eight bits wrongly, so tests in it read the unrounded values.
DTYPE = torch.float8_e4m3fn
#: Values of a row per thread.
VALUES = 32
#: Tokens per program of the kernels for heads.
HEAD_TOKENS = 64


def quantize_rows(x_RD: Tensor, addend_RD: Tensor | None = None, *, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Return float8 ``[R, D]`` and float32 scales ``[R, 1]`` of each row, after a sum or an activation.

    Args:
        x_RD: contiguous.
        addend_RD: contiguous; added first.
        gelu: apply the tanh-approximated GELU first.
    """
    rows, width = x_RD.shape
    values, scales = empty_rows(x_RD)
    block = triton.next_power_of_2(width)
    if rows:
        _quantize_rows[(rows,)](
            x_RD,
            x_RD if addend_RD is None else addend_RD,
            values,
            scales,
            D=width,
            BLOCK=block,
            SUM=addend_RD is not None,
            GELU=gelu,
            num_warps=min(max(block // (32 * VALUES), 1), 32),
        )
    return values, scales


def quantize_heads(x_BSNH: Tensor) -> tuple[Tensor, Tensor]:
    """Return contiguous float8 ``[B, S, N, H]`` and float32 scales ``[B, N]`` of each head over all tokens.

    Args:
        x_BSNH: any strides except the last, such as a slice of a fused projection.
    """
    batch, tokens, heads, size = x_BSNH.shape
    values = x_BSNH.new_empty(x_BSNH.shape, dtype=DTYPE)
    largest = x_BSNH.new_zeros(batch, heads, dtype=torch.float32)
    scales = torch.empty_like(largest)
    grid = (triton.cdiv(tokens, HEAD_TOKENS), heads, batch)
    sizes = {"H": size, "TOKENS": HEAD_TOKENS, "BLOCK": triton.next_power_of_2(size)}
    if x_BSNH.numel():
        _largest_of_heads[grid](x_BSNH, largest, *x_BSNH.stride()[:3], tokens, heads, **sizes)
        strides = *x_BSNH.stride()[:3], *values.stride()[:3]
        _quantize_heads[grid](x_BSNH, largest, values, scales, *strides, tokens, heads, **sizes)
    return values, scales


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return tensors for the values and the scales of quantized tokens ``[..., D]``."""
    return torch.empty_like(x, dtype=DTYPE), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@triton.jit
def store_quantized(
    x: tl.tensor, row: tl.tensor, at: tl.tensor, values_ptr: tl.tensor, scales_ptr: tl.tensor, D: tl.constexpr
) -> None:
    """Store a row and its scale; ``x`` is 0 beyond ``D``."""
    largest = tl.maximum(tl.max(tl.abs(x), 0), _SMALLEST)
    values = (x * (_FP8_MAX / largest)).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + row * D + at, values, mask=at < D)
    tl.store(scales_ptr + row, largest / _FP8_MAX)


@triton.jit
def _quantize_rows(
    x_ptr: tl.tensor,
    addend_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
    GELU: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * D + at, mask=at < D, other=0.0)
    if SUM:
        addend = tl.load(addend_ptr + row * D + at, mask=at < D, other=0.0)
        x = x.to(tl.float32) + addend.to(tl.float32)
    x = x.to(tl.float32)
    if GELU:
        # 1 + tanh(y) is 2 * sigmoid(2 * y); y is sqrt(2 / pi) * (x + 0.044715 * x^3)
        x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    store_quantized(x, row, at, values_ptr, scales_ptr, D)


@triton.jit
def _head_offsets(
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    tokens: tl.tensor,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return offsets and mask of this program's tokens of its head."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    return b * batch_stride + token * token_stride + head * head_stride + at, (token < tokens) & (at < H)


@triton.jit
def _largest_of_heads(
    x_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    offsets, inside = _head_offsets(batch_stride, token_stride, head_stride, tokens, H, TOKENS, BLOCK)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.atomic_max(largest_ptr + tl.program_id(2) * heads + tl.program_id(1), tl.max(tl.max(tl.abs(x), 1), 0))


@triton.jit
def _quantize_heads(
    x_ptr: tl.tensor,
    largest_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    batch_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    values_batch_stride: tl.tensor,
    values_token_stride: tl.tensor,
    values_head_stride: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    offsets, inside = _head_offsets(batch_stride, token_stride, head_stride, tokens, H, TOKENS, BLOCK)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    place = tl.program_id(2) * heads + tl.program_id(1)
    largest = tl.maximum(tl.load(largest_ptr + place), _SMALLEST)
    places, _ = _head_offsets(values_batch_stride, values_token_stride, values_head_stride, tokens, H, TOKENS, BLOCK)
    tl.store(values_ptr + places, (x * (_FP8_MAX / largest)).to(values_ptr.dtype.element_ty), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(scales_ptr + place, largest / _FP8_MAX)
