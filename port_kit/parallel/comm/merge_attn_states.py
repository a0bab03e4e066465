"""Merge of two attention outputs for the same queries over disjoint keys.

With outputs ``a``, ``b`` and log-sum-exps ``s``, ``t``, the merged output is ``a + sigmoid(t - s) * (b - a)`` and its
log-sum-exp is ``max(s, t) + log1p(exp(-|s - t|))``. On CUDA a Triton kernel computes both
(:mod:`~port_kit.parallel.comm.merge_attn_kernel`). vLLM's CUDA function of the same name requires one dtype for both
inputs and the output; Ring accumulates bfloat16 blocks in float32.

Shape suffixes: B batch, S tokens, N heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attn_states(
    a_BSNH: Tensor, s_BNS: Tensor, b_BSNH: Tensor, t_BNS: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the merged output ``[B, S, N, H]`` in ``dtype`` and its log-sum-exp, float32 ``[B, N, S]``.

    Args:
        a_BSNH: first output; contiguous on CUDA.
        s_BNS: log-sum-exp of the first output, float32.
        b_BSNH: second output; contiguous on CUDA.
        t_BNS: log-sum-exp of the second output, float32.
        dtype: dtype of the merged output; it is computed in float32.
    """
    if not a_BSNH.is_cuda:
        return merge_attn_states_torch(a_BSNH, s_BNS, b_BSNH, t_BNS, dtype)
    from port_kit.parallel.comm.merge_attn_kernel import merge_attn_states as kernel

    return kernel(a_BSNH, s_BNS, b_BSNH, t_BNS, dtype)


def merge_attn_states_torch(
    a_BSNH: Tensor, s_BNS: Tensor, b_BSNH: Tensor, t_BNS: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute :func:`merge_attn_states` in plain PyTorch."""
    share = torch.sigmoid(t_BNS - s_BNS).transpose(1, 2).unsqueeze(-1)
    a, b = a_BSNH.float(), b_BSNH.float()
    return (a + share * (b - a)).to(dtype), torch.logaddexp(s_BNS, t_BNS)
