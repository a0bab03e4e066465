"""RMS norm over heads that are split over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)


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
        wide = x.float()
        mean = wide.square().sum(-1, keepdim=True)
        if self.ranks > 1:
            mean = tensor_model_parallel_all_reduce(mean)
        return (wide * torch.rsqrt(mean / self.dim + self.eps)).to(x.dtype) * self.weight


def _load_own_part(parameter: nn.Parameter, loaded: Tensor) -> None:
    """Copy this rank's part of a full weight."""
    size = parameter.shape[0]
    parameter.data.copy_(loaded.narrow(0, get_tensor_model_parallel_rank() * size, size))
