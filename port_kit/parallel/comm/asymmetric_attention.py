"""Sequence-parallel attention for unequal lengths: all-gather the shorter operand.

Ulysses, Ring and AllGather-KV communicate keys and values of any length; Ulysses also queries and outputs. If one
operand has few tokens (audio beside video), gathering only that operand needs far fewer bytes. Both strategies replace
the strategy of one ``Attention`` layer, under any kind of sequence parallelism:

* :class:`GatherKVStrategy`, for short keys: each rank gathers all keys and attends with its local queries.
* :class:`GatherQueryStrategy`, for short queries: each rank gathers all queries and attends to its local keys. The
  partial outputs are merged by their log-sum-exp.

Select them with ``PaddedAttention(..., gather="kv")`` or ``gather="q"``. The result is exact for any lengths.

Shape suffixes: B batch, S tokens of this rank, Q all queries, P ranks, N heads, H head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm_omni.diffusion.attention.backends.ring.ring_kernels import pytorch_attn_forward
from vllm_omni.diffusion.attention.backends.ring.ring_utils import ring_kv_block_valid_length
from vllm_omni.diffusion.attention.parallel.base import ParallelAttentionContext

from port_kit.parallel.comm.symm_mem import get_peer_buffers
from port_kit.upstream.checks import require
from port_kit.upstream.ring_kernels import flash_attention, flash_kernel

if TYPE_CHECKING:
    from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
    from vllm_omni.diffusion.distributed.group_coordinator import SequenceParallelGroupCoordinator

require("ring_kernels")

Prepared = tuple[Tensor, Tensor, Tensor, "AttentionMetadata | None", ParallelAttentionContext | None]


class GatherKVStrategy:
    """Local queries attend to the keys and values of all ranks, gathered in one collective."""

    name = "gather_kv"
    enabled = True

    def __init__(self, group: SequenceParallelGroupCoordinator) -> None:
        self.group = group

    def pre_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None
    ) -> Prepared:
        """Return local queries and gathered keys and values."""
        both = _gather(self.group, torch.stack((key, value)), dim=2)
        return query, both[0], both[1], attn_metadata, None

    def post_attention(self, attn_output: Tensor, ctx: ParallelAttentionContext | None) -> Tensor:
        """Return the output unchanged."""
        return attn_output


class GatherQueryStrategy:
    """Queries of all ranks attend to local keys; each rank merges the partial outputs of its queries."""

    name = "gather_q"
    enabled = True

    def __init__(self, group: SequenceParallelGroupCoordinator) -> None:
        self.group = group

    def pre_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None
    ) -> Prepared:
        """Return gathered queries and local keys and values."""
        return _gather(self.group, query, dim=1), key, value, attn_metadata, None

    def attend(self, q_BQNH: Tensor, key: Tensor, value: Tensor, length: int | None, scale: float) -> Tensor:
        """Attend to local keys; return outputs and log-sum-exp, concatenated to float32 ``[B, Q, N, H + 1]``.

        Args:
            q_BQNH: queries of all ranks.
            key: ``[B, S, N, H]``; may end with padding on the last ranks.
            value: as ``key``.
            length: keys of all ranks without padding; None if there is no padding.
            scale: softmax scale.
        """
        valid = ring_kv_block_valid_length(length, key.shape[1], self.group.rank_in_group, self.group.world_size)
        if not valid:
            zeros = q_BQNH.new_zeros(q_BQNH.shape, dtype=torch.float32)
            return torch.cat((zeros, zeros.new_full((*q_BQNH.shape[:3], 1), -torch.inf)), -1)
        flash = q_BQNH.dtype != torch.float32 and flash_kernel(q_BQNH.device) is not None
        attend = flash_attention if flash else _torch_attention
        out, lse_BNQ = attend(q_BQNH, key[:, :valid], value[:, :valid], scale)
        return torch.cat((out.float(), lse_BNQ.transpose(1, 2).unsqueeze(-1)), -1)

    def post_attention(self, attn_output: Tensor, ctx: ParallelAttentionContext | None) -> Tensor:
        """Merge the partial outputs of this rank's queries; return float32 ``[B, S, N, H]``."""
        parts = _gather(self.group, attn_output.unsqueeze(0), dim=0)
        local = attn_output.shape[1] // self.group.world_size
        own = parts[:, :, self.group.rank_in_group * local :][:, :, :local]
        weights = torch.softmax(own[..., -1:], 0)
        return (own[..., :-1] * weights).sum(0)


def _gather(group: SequenceParallelGroupCoordinator, x: Tensor, dim: int) -> Tensor:
    peers = get_peer_buffers(group.device_group, x)
    return group.all_gather(x, dim=dim) if peers is None else peers.gather(x, dim)


def _torch_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = pytorch_attn_forward(query, key, value, softmax_scale=scale, causal=False)
    return out, lse[..., : query.shape[1]]
