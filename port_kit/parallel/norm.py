"""RMS norm over heads that are split over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)

from port_kit.parallel.linear import sum_over_ranks


class FullWidthRMSNorm(nn.Module):
    """RMS norm over the width of all heads, exact under tensor parallelism.

    Each rank holds the weight of its heads; square sums are all-reduced.

    Args:
        dim: full width.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.ranks = get_tensor_model_parallel_world_size()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim // self.ranks), requires_grad=False)
        self.weight.weight_loader = _load_own_part
        self.weight.full_shape = (dim,)  # shape in the checkpoint, for coverage checks

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[..., D]`` over all ranks; D is this rank's part of the width. Statistics are float32."""
        sums = square_sums(x)
        return rms_norm(x, sum_over_ranks(sums) if self.ranks > 1 else sums, self.weight, self.dim, self.eps)


def square_sums(x: Tensor) -> Tensor:
    """Return the sum of squares of the last dimension, float32 ``[...]`` for ``x`` of shape ``[..., D]``."""
    if x.is_cuda:
        from port_kit.parallel import norm_kernels

        return norm_kernels.square_sums(_rows(x)).view(x.shape[:-1])
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square()


def rms_norm(x: Tensor, sums: Tensor, weight: Tensor | None, width: int, eps: float) -> Tensor:
    """Return ``x`` divided by its root mean square over all ranks, and multiplied by ``weight``.

    Args:
        x: ``[..., D]``, this rank's part of the width.
        sums: float32 ``[...]``, sums of squares over all ranks.
        weight: ``[D]``, or None for 1.
        width: width over all ranks.
        eps: added to the mean square.
    """
    if x.is_cuda:
        from port_kit.parallel import norm_kernels

        return norm_kernels.rms_norm(_rows(x), sums.flatten(), weight, width, eps).view(x.shape)
    normed = (x.float() * torch.rsqrt(sums / width + eps).unsqueeze(-1)).to(x.dtype)
    return normed if weight is None else normed * weight


def _rows(x: Tensor) -> Tensor:
    """Return ``[R, D]`` with contiguous rows; a slice of a fused projection is not copied."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _load_own_part(parameter: nn.Parameter, loaded: Tensor) -> None:
    """Copy this rank's part of a full weight."""
    size = parameter.shape[0]
    parameter.data.copy_(loaded.narrow(0, get_tensor_model_parallel_rank() * size, size))
