"""Two attentions of the same queries to different keys, put together as if it had been one.

With outputs ``a``, ``b`` and log-sum-exps ``s``, ``t``, the whole output is ``a + sigmoid(t - s) * (b - a)`` and its
log-sum-exp ``max(s, t) + log1p(exp(-|s - t|))``. On CUDA a Triton kernel
(:mod:`~port_kit.parallel.comm.merge_attn_kernel`) reads both once and writes once.

Shape suffixes: B batch, S tokens, N heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attn_states(
    a_BSNH: Tensor, s_BNS: Tensor, b_BSNH: Tensor, t_BNS: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, S, N, H]`` in ``dtype`` and the log-sum-exp, float32 ``[B, N, S]``.

    Args:
        a_BSNH: one output; contiguous on CUDA.
        s_BNS: its log-sum-exp, float32.
        b_BSNH: the other output, likewise.
        t_BNS: its log-sum-exp.
        dtype: of the result; sums are float32.
    """
    if not a_BSNH.is_cuda:
        return merge_attn_states_torch(a_BSNH, s_BNS, b_BSNH, t_BNS, dtype)
    from port_kit.parallel.comm.merge_attn_kernel import merge_attn_states as kernel

    return kernel(a_BSNH, s_BNS, b_BSNH, t_BNS, dtype)


def merge_attn_states_torch(
    a_BSNH: Tensor, s_BNS: Tensor, b_BSNH: Tensor, t_BNS: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what :func:`merge_attn_states` does, in plain PyTorch."""
    share = torch.sigmoid(t_BNS - s_BNS).transpose(1, 2).unsqueeze(-1)
    a, b = a_BSNH.float(), b_BSNH.float()
    return (a + share * (b - a)).to(dtype), torch.logaddexp(s_BNS, t_BNS)
