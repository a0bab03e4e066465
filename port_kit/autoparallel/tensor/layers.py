"""Layers that vLLM lacks: convolutions and norms over channels that are split."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce

from port_kit.autoparallel.tensor.blocks import is_channels_last
from port_kit.autoparallel.tensor.norms import norm_eps
from port_kit.parallel.linear import sum_over_ranks
from port_kit.parallel.norm import rms_norm, square_sums
from port_kit.parallel.sharded_parameter import sharded_parameter


def local_part(x: Tensor, dim: int, parts: Sequence[int], rank: int, ranks: int) -> Tensor:
    """Return a rank's entries of a dimension that consists of parts, each of which is split evenly."""
    pieces, at = [], 0
    for size in parts:
        pieces.append(x.narrow(dim, at + rank * (size // ranks), size // ranks))
        at += size
    return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]


class ShardedConv(nn.Module):
    """A convolution over tokens with its output or its input channels split.

    Args:
        plain: convolution with one group.
        role: split by output, by input (its output is all-reduced), or by output and all-gathered.
        parts: sizes of the parts of the split channels.
        rank, ranks: of the tensor-parallel group.

    Attributes:
        replaces: class of the convolution.
        channels_last: it reads channels from the last axis.
    """

    def __init__(self, plain: nn.Module, role: str, parts: Sequence[int], rank: int, ranks: int) -> None:
        super().__init__()
        assert isinstance(plain, nn.modules.conv._ConvNd)
        self.role, self.replaces = role, type(plain)
        self.channels_last = is_channels_last(plain)
        # the convolution's own code is used with a weight of fewer channels
        self.__dict__["plain"] = own = copy.copy(plain)
        own._parameters = dict(plain._parameters)
        self.weight = sharded_parameter(plain.weight, int(role == "row"), rank, ranks)
        self.bias = None
        if plain.bias is not None:
            whole = nn.Parameter(torch.empty_like(plain.bias), requires_grad=False)
            self.bias = whole if role == "row" else sharded_parameter(plain.bias, 0, rank, ranks)
        if role == "row":
            own.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve this rank's channels."""
        plain: Any = self.__dict__["plain"]
        own = {"weight": self.weight} if plain.bias is None else {"weight": self.weight, "bias": self.bias}
        local = functional_call(plain, own, (x,))
        axis = -1 if self.channels_last else -1 - len(plain.kernel_size)
        if self.role == "column":
            return local
        if self.role == "gathered":
            return tensor_model_parallel_all_gather(local.contiguous(), axis)
        total = tensor_model_parallel_all_reduce(local)
        if self.bias is None:
            return total
        return total + (self.bias if self.channels_last else self.bias.reshape(-1, *(1 for _ in plain.kernel_size)))


class ShardedNorm(nn.Module):
    """RMS norm or layer norm over channels that are split over the ranks. Statistics are float32 and all-reduced.

    Args:
        plain: norm with ``eps``, and ``weight`` and ``bias`` over all channels or None.
        kind: statistics.
        rank, ranks: of the tensor-parallel group.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, plain: nn.Module, kind: Literal["rms", "layer"], rank: int, ranks: int) -> None:
        super().__init__()
        self.kind, self.ranks = kind, ranks
        self.eps = norm_eps(plain)
        for name in ("weight", "bias"):
            whole = getattr(plain, name, None)
            setattr(self, name, None if whole is None else sharded_parameter(whole, 0, rank, ranks))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[..., C]`` over the channels of all ranks; C is this rank's part."""
        channels = x.shape[-1] * self.ranks
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        if self.kind == "rms":
            normed = rms_norm(x, sum_over_ranks(square_sums(x)), self.weight, channels, eps)
        else:
            wide = x.float()
            wide = wide - sum_over_ranks(wide.sum(-1, keepdim=True)) / channels
            squares = sum_over_ranks(square_sums(wide))
            normed = rms_norm(wide, squares, None, channels, eps).to(x.dtype)
            normed = normed if self.weight is None else normed * self.weight
        return normed if self.bias is None else normed + self.bias
