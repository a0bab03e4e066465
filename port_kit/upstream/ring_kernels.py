"""FlashAttention with log-sum-exp, as Ring attention of vLLM-Omni uses it.

0.30 has the kernels of FlashAttention-3's own packages. 0.32 prefers those that vLLM bundles.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from port_kit.upstream.checks import require
from port_kit.upstream.series import installed_series

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_RING = "vllm_omni.diffusion.attention.parallel.ring"
_KERNELS = "vllm_omni.diffusion.attention.backends.ring.ring_kernels"
_FLASH_3 = ("_can_use_fa3", "flash_attn3_func_forward")
_BUNDLED = ("_can_use_vllm_flash_attn", "vllm_flash_attn_forward")

#: By series, vLLM-Omni's test for a device and its kernel, the preferred one first.
CHOICES = {"0.30": (_FLASH_3,), "0.32": (_BUNDLED, _FLASH_3)}


def flash_kernel(device: torch.device) -> Callable[..., Any] | None:
    """Return vLLM-Omni's preferred kernel for a device, or None.

    Raises:
        RegistrationError: ``upstream_changed``.
    """
    require("ring_kernels")
    ring, kernels = import_module(_RING), import_module(_KERNELS)
    for usable, kernel in CHOICES[installed_series()]:
        if getattr(ring, usable)(device):
            found: Callable[..., Any] = getattr(kernels, kernel)
            return found
    return None


def flash_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, S, N, H]`` and the log-sum-exp, float32 ``[B, N, S]``.

    Args:
        query: ``[B, S, N, H]`` in 16 bits, on a device for which :func:`flash_kernel` is not None.
        key: ``[B, K, N, H]``.
        value: as ``key``.
        scale: softmax scale.
    """
    kernel = flash_kernel(query.device)
    assert kernel is not None, query.device
    out, lse = kernel(
        query,
        key,
        value,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    )
    return out, lse[..., : query.shape[1]]  # some kernels pad it
