"""Triton kernel of :mod:`~port_kit.parallel.comm.merge_attn_states`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Output values per program.
VALUES = 4096


def merge_attn_states(
    a_BSNH: Tensor, s_BNS: Tensor, b_BSNH: Tensor, t_BNS: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Merge two outputs; see :func:`port_kit.parallel.comm.merge_attn_states.merge_attn_states`.

    Log-sum-exps may have any strides.
    """
    batch, tokens, heads, size = a_BSNH.shape
    out = torch.empty_like(a_BSNH, dtype=dtype)
    lse = s_BNS.new_empty(batch, heads, tokens)
    rows, block = batch * tokens * heads, triton.next_power_of_2(size)
    together = max(VALUES // block, 1)
    if rows:
        _merge[(triton.cdiv(rows, together),)](
            a_BSNH.contiguous(),
            b_BSNH.contiguous(),
            out,
            s_BNS,
            t_BNS,
            lse,
            *s_BNS.stride(),
            *t_BNS.stride(),
            rows,
            tokens,
            heads,
            H=size,
            BLOCK=block,
            ROWS=together,
        )
    return out, lse


@triton.jit
def _merge(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    out_ptr: tl.tensor,
    s_ptr: tl.tensor,
    t_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    s_b: tl.tensor,
    s_n: tl.tensor,
    s_s: tl.tensor,
    t_b: tl.tensor,
    t_n: tl.tensor,
    t_s: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    head, token, sample = row % heads, (row // heads) % tokens, row // (heads * tokens)
    s = tl.load(s_ptr + sample * s_b + head * s_n + token * s_s, mask=exists, other=0.0)
    t = tl.load(t_ptr + sample * t_b + head * t_n + token * t_s, mask=exists, other=0.0)
    at = row[:, None] * H + tl.arange(0, BLOCK)[None, :]
    inside = exists[:, None] & (tl.arange(0, BLOCK)[None, :] < H)
    a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(s - t))
    tl.store(out_ptr + at, (a + share[:, None] * (b - a)).to(out_ptr.dtype.element_ty), mask=inside)
    lse = tl.maximum(s, t) + tl.log(1.0 + tl.exp(-tl.abs(s - t)))
    tl.store(lse_ptr + (sample * heads + head) * tokens + token, lse, mask=exists)
