"""Attention in eight-bit floats with FlashAttention-3: queries, keys and values have a scale per sample and head.

``diffusion_kv_cache_dtype="fp8"`` selects it for layers that do not decline it
(:class:`~port_kit.parallel.sequence.PaddedAttention`). vLLM-Omni 0.30 has no such kernels on GPUs, and 0.32 has one
scale per tensor. Scales are those of the tokens that a rank attends with; no state is kept.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.platforms import current_platform

from port_kit.upstream.checks import require

if TYPE_CHECKING:
    from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend

#: Head dims of the kernels.
HEAD_DIMS = (64, 128, 256)


def is_supported(backend: type[AttentionBackend], head_dim: int) -> bool:
    """Return True if a layer on this backend can attend in eight bits on this device."""
    return backend.get_name() == "FLASH_ATTN" and head_dim in HEAD_DIMS and _has_kernels()


@cache
def _has_kernels() -> bool:
    if not current_platform.is_cuda():
        return False
    require("fp8_attention_kernels")
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    return bool(is_fa_version_supported(3))


def attend(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Tensor:
    """Return the attention of ``[B, Sq, N, H]`` to ``[B, Sk, N, H]``, bfloat16 ``[B, Sq, N, H]``.

    The last dimension of each tensor is contiguous.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    from port_kit.parallel.fp8_kernels import quantize_heads

    (q, q_scale), (k, k_scale), (v, v_scale) = map(quantize_heads, (query, key, value))
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    attended: Tensor = flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        max_seqlen_q=queries,
        cu_seqlens_q=starts * queries,
        max_seqlen_k=keys,
        cu_seqlens_k=starts * keys,
        softmax_scale=softmax_scale,
        q_descale=q_scale,
        k_descale=k_scale,
        v_descale=v_scale,
        fa_version=3,
    )
    return attended.unflatten(0, (batch, queries))
