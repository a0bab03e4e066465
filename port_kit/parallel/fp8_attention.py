"""Attention in eight-bit floats with FlashAttention-3: queries, keys and values have a scale per sample and head.

``diffusion_kv_cache_dtype="fp8"`` selects it for layers that do not decline it
(:class:`~port_kit.parallel.sequence.PaddedAttention`). vLLM-Omni 0.30 has no such kernels on GPUs, and 0.32 has one
scale per tensor. Scales are those of the tokens that a rank attends with; no state is kept.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import Tensor
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend

#: Head dims of the kernels.
HEAD_DIMS = (64, 128, 256)


def is_supported(backend: type[AttentionBackend], head_dim: int) -> bool:
    """Return True if a layer on this backend can attend in eight bits on this device."""
    return backend.get_name() == "FLASH_ATTN" and head_dim in HEAD_DIMS and _has_kernels()


@cache
def _has_kernels() -> bool:
    """Return True on Hopper with the package that vLLM-Omni's own FlashAttention backend prefers there."""
    if not current_platform.is_cuda() or not current_platform.is_device_capability(90):
        return False
    return find_spec("fa3_fwd_interface") is not None


def attend(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Tensor:
    """Return the attention of ``[B, Sq, N, H]`` to ``[B, Sk, N, H]``, bfloat16 ``[B, Sq, N, H]``.

    The values' mean over the tokens is added afterwards, since attention weights add up to 1: the kernel sums with
    fewer bits than float32 has, and would lose a part of it in long sequences.

    The last dimension of each tensor is contiguous.
    """
    from fa3_fwd_interface import flash_attn_func

    from port_kit.parallel.fp8_kernels import quantize_heads

    mean = value.mean(1, keepdim=True)
    (q, q_scale), (k, k_scale), (v, v_scale) = map(quantize_heads, (query, key, value - mean))
    scales = {"q_descale": q_scale, "k_descale": k_scale, "v_descale": v_scale}
    attended = flash_attn_func(q, k, v, softmax_scale=softmax_scale, **scales)
    return (attended[0] if isinstance(attended, tuple) else attended) + mean
