"""Ulysses and Ring attention with fewer copies than vLLM-Omni's strategies.

The communication volume is unchanged. On one host, symmetric memory replaces NCCL
(:mod:`~port_kit.parallel.comm.symm_mem`). Ulysses packs and unpacks heads in 128-bit words, one copy per tensor. Ring
merges each block's output in one kernel (:mod:`~port_kit.parallel.comm.merge_attn_states`).

:class:`~port_kit.parallel.sequence.PaddedAttention` applies :func:`optimize_strategy`. Inputs that are not supported
here use vLLM-Omni's code: float32, joint attention, uneven heads, and kernels other than FlashAttention-3.

Shape suffixes: B batch, S tokens of this rank, P ranks, N heads, n heads per rank after the exchange, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm_omni.diffusion.attention.backends.ring.ring_utils import ring_kv_block_valid_length
from vllm_omni.diffusion.attention.parallel.base import ParallelAttentionContext
from vllm_omni.diffusion.attention.parallel.ring import RingParallelAttention
from vllm_omni.diffusion.attention.parallel.ulysses import UlyssesParallelAttention
from vllm_omni.diffusion.distributed.comm import RingComm
from vllm_omni.diffusion.forward_context import get_ulysses_mode

from port_kit.parallel.comm.merge_attn_states import merge_attn_states
from port_kit.parallel.comm.symm_mem import PeerBuffers, get_peer_buffers
from port_kit.upstream.checks import require
from port_kit.upstream.ring_kernels import flash_attention, flash_kernel

if TYPE_CHECKING:
    from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata

require("ulysses_strategy")
require("ring_strategy")
require("ring_communication")

#: A 16-byte dtype for copies: one element holds eight bfloat16 values.
DTYPE_128BIT = torch.complex128


@dataclass(frozen=True)
class ExchangedContext(ParallelAttentionContext):
    """Marker context: :class:`FusedUlysses` exchanged the inputs and must exchange the output."""


class FusedUlysses(UlyssesParallelAttention):
    """Ulysses attention with one packing copy each for queries, keys, values and outputs."""

    def pre_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None, **options: bool
    ) -> tuple[Any, ...]:
        """Scatter heads and gather tokens: ``[B, S, N, H]`` becomes ``[B, P * S, n, H]``.

        ``options`` are those of vLLM-Omni's method (``defer_joint``); its code runs if one is set.
        """
        ranks = torch.distributed.get_world_size(self._ulysses_pg)
        uneven = any(x.shape[2] % ranks for x in (query, key, value))
        special = self._use_sync or self._ulysses_a2a_permute or get_ulysses_mode(default="strict") != "strict"
        if uneven or special or any(options.values()) or not _is_unmasked(attn_metadata):
            return super().pre_attention(query, key, value, attn_metadata, **options)
        peers = get_peer_buffers(self._ulysses_pg, query)
        if peers is not None and query.shape == key.shape == value.shape:
            exchanged = _all_to_all_qkv(peers, (query, key, value))
        else:
            exchanged = [self._gather_tokens(x, ranks) for x in (query, key, value)]
        return *exchanged, attn_metadata, ExchangedContext(self.name)

    def post_attention(self, attn_output: Tensor, ctx: ParallelAttentionContext | None) -> Tensor:
        """Scatter tokens and gather heads: ``[B, P * S, n, H]`` becomes ``[B, S, N, H]``."""
        if not isinstance(ctx, ExchangedContext):
            return super().post_attention(attn_output, ctx)
        ranks = torch.distributed.get_world_size(self._ulysses_pg)
        parts = attn_output.unflatten(1, (ranks, -1)).transpose(0, 1)
        peers = get_peer_buffers(self._ulysses_pg, attn_output)
        if peers is not None:
            return _all_to_all_output(peers, parts)
        received = self._all_to_all(parts)
        return from_128bit(as_128bit(received).permute(1, 2, 0, 3, 4).flatten(2, 3), attn_output.dtype)

    def _gather_tokens(self, x_BSNH: Tensor, ranks: int) -> Tensor:
        parts = as_128bit(x_BSNH).unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4).contiguous()
        return self._all_to_all(from_128bit(parts, x_BSNH.dtype)).transpose(0, 1).flatten(1, 2)

    def _all_to_all(self, parts: Tensor) -> Tensor:
        """Send chunk i to rank i; return the received chunks, ``[P, ...]`` by rank."""
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        torch.distributed.all_to_all_single(received, parts, group=self._ulysses_pg)
        return received


def _all_to_all_qkv(peers: PeerBuffers, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Scatter heads and gather tokens of equally shaped ``[B, S, N, H]`` tensors in one exchange."""
    batch, tokens, heads, size = tensors[0].shape
    dtype = tensors[0].dtype
    buffers = peers.next_buffers((len(tensors), peers.size, batch, tokens, heads // peers.size, size), dtype)
    for index, x in enumerate(tensors):
        parts_PBSnH = as_128bit(x).unflatten(2, (peers.size, -1)).permute(2, 0, 1, 3, 4)
        for rank in peers.peer_ranks:  # contiguous, so that a copy engine is used
            buffers[rank][index, peers.rank].copy_(from_128bit(parts_PBSnH[rank].contiguous(), dtype))
        copy_128bit(buffers[peers.rank][index, peers.rank], x.unflatten(2, (peers.size, -1))[:, :, peers.rank])
    peers.barrier()
    return [received.transpose(0, 1).flatten(1, 2) for received in buffers[peers.rank].unbind(0)]


def _all_to_all_output(peers: PeerBuffers, parts_PBSnH: Tensor) -> Tensor:
    """Scatter tokens and gather heads; return ``[B, S, N, H]``."""
    ranks, batch, tokens, heads, size = parts_PBSnH.shape
    buffers = peers.next_buffers(parts_PBSnH.shape, parts_PBSnH.dtype)
    for rank in peers.peer_ranks:
        buffers[rank][peers.rank].copy_(parts_PBSnH[rank])
    peers.barrier()
    output = parts_PBSnH.new_empty(batch, tokens, ranks, heads, size)
    for rank in range(ranks):
        received = parts_PBSnH[rank] if rank == peers.rank else buffers[peers.rank][rank]
        copy_128bit(output[:, :, rank], received)
    return output.flatten(2, 3)


class FusedRing(RingParallelAttention):
    """Ring attention that merges each block with one kernel."""

    def run_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_metadata: AttentionMetadata | None,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attend to the keys of all ranks; arguments as in vLLM-Omni's method."""
        flash = self.attn_backend_pref is None or self.attn_backend_pref.lower() == "flash_attn"
        flash = flash and query.dtype != torch.float32 and flash_kernel(query.device) is not None
        if causal or not flash or not _is_unmasked(attn_metadata):
            options = {"softmax_scale": softmax_scale, "causal": causal}
            return super().run_attention(query, key, value, attn_metadata, **options)
        length = attn_metadata.extra.get("valid_kv_length") if attn_metadata is not None else None
        scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        return self._run_ring(query.contiguous(), key.contiguous(), value.contiguous(), length, scale)

    def _run_ring(self, query: Tensor, key: Tensor, value: Tensor, length: int | None, scale: float) -> Tensor:
        ring = RingComm(self._sp_group.ring_group)
        ranks = ring.world_size
        peers = get_peer_buffers(self._sp_group.ring_group, key, num_buffers=3)
        transfer = RingKVTransfer(ring, key, value) if peers is None else P2PKVTransfer(peers, key, value)
        out = lse = None
        for turn in range(ranks):
            is_last = turn + 1 == ranks
            if not is_last:
                transfer.start()
            valid = ring_kv_block_valid_length(length, key.shape[1], (ring.rank - turn) % ranks, ranks)
            if valid:
                new_out, new_lse = flash_attention(query, key[:, :valid], value[:, :valid], scale)
                if out is None or lse is None:
                    out, lse = new_out, new_lse
                else:
                    out, lse = merge_attn_states(out, lse, new_out, new_lse, query.dtype if is_last else torch.float32)
            if not is_last:
                key, value = transfer.finish()
        assert out is not None  # at least one key is valid
        return out.to(query.dtype)


class RingKVTransfer:
    """Ring transfer through NCCL: the previous rank sends its current block."""

    def __init__(self, ring: RingComm, key: Tensor, value: Tensor) -> None:
        self.ring, self.block = ring, (key, value)

    def start(self) -> None:
        """Start receiving the next block."""
        key, value = self.block
        self.block = self.ring.send_recv(key), self.ring.send_recv(value)
        self.ring.commit()

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the next block."""
        self.ring.wait()
        return self.block


class P2PKVTransfer:
    """Transfer through symmetric memory on a side stream: each owner sends its block to each rank."""

    def __init__(self, peers: PeerBuffers, key: Tensor, value: Tensor) -> None:
        self.peers, self.own = peers, (key, value)
        self.turn = 0
        self.stream = _side_stream(torch.cuda.current_stream(key.device)) if key.is_cuda else None

    def start(self) -> None:
        """Send this rank's block to the rank that needs it next."""
        peers = self.peers
        self.turn += 1
        self.buffers = peers.next_buffers((2, *self.own[0].shape), self.own[0].dtype)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for buffer, tensor in zip(self.buffers[(peers.rank + self.turn) % peers.size], self.own, strict=True):
                buffer.copy_(tensor)
            peers.barrier()

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of the next block after making the current stream wait for them."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        key, value = self.buffers[self.peers.rank]
        return key, value


@cache
def _side_stream(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    return torch.cuda.Stream(stream.device)


def _is_unmasked(metadata: AttentionMetadata | None) -> bool:
    """Return True if the metadata hold no mask and no joint tokens."""
    if metadata is None:
        return True
    given = (metadata.attn_mask, metadata.joint_attn_mask, metadata.joint_query, metadata.joint_key)
    return all(tensor is None for tensor in given) and metadata.extra.keys() <= {"valid_kv_length"}


def optimize_strategy(strategy: Any) -> Any:
    """Return the fused equivalent of a vLLM-Omni strategy, or the strategy itself if there is none."""
    if type(strategy) is UlyssesParallelAttention:
        dims = strategy._scatter_idx, strategy._gather_idx
        return FusedUlysses(strategy._sp_group, *dims, strategy._use_sync, strategy._ulysses_a2a_permute)
    if type(strategy) is RingParallelAttention:
        return FusedRing(strategy._sp_group, strategy.attn_backend_pref, strategy.attn_backend_explicit)
    return strategy


def as_128bit(x: Tensor) -> Tensor:
    """Return a 128-bit view, or ``x`` itself if its alignment or last dimension does not allow it."""
    size = DTYPE_128BIT.itemsize
    aligned = x.stride(-1) == 1 and all(stride * x.itemsize % size == 0 for stride in x.stride()[:-1])
    fits = x.shape[-1] * x.itemsize % size == 0 and x.storage_offset() * x.itemsize % size == 0
    return x.view(DTYPE_128BIT) if aligned and fits else x


def copy_128bit(to: Tensor, x: Tensor) -> None:
    """Copy ``x`` to a tensor of equal shape and dtype, in 128-bit words if both allow it."""
    wide, given = as_128bit(to), as_128bit(x)
    if wide.dtype == given.dtype:
        wide.copy_(given)
    else:
        to.copy_(x)


def from_128bit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the view of :func:`as_128bit` in its original dtype."""
    return x.view(dtype)
