"""SDPA attention on the CPU platform.

Tensors are [B, S, N, H]: batch, sequence, heads, head size; any floating dtype that CPU SDPA supports.
"""

from __future__ import annotations

import torch
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend, SDPAImpl

from port_kit.upstream.checks import require

require("sdpa_forward")


class CpuSDPAImpl(SDPAImpl):
    """vLLM-Omni's SDPA without its dispatch over accelerators, which raises on other platforms."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: AttentionMetadata | None = None,
    ) -> torch.Tensor:
        """Compute attention of query [B, Sq, N, H] to key and value [B, Sk, N or fewer, H]; return [B, Sq, N, H]."""
        return self._forward_impl(query, key, value, attn_metadata)


class CpuSDPABackend(SDPABackend):
    """SDPA backend; its upstream name ``SDPA`` selects the SDPA kernels of Ring attention."""

    @staticmethod
    def get_impl_cls() -> type[CpuSDPAImpl]:
        """Return the implementation class."""
        return CpuSDPAImpl
