"""Peer-to-peer exchange through PyTorch symmetric memory, without NCCL kernels.

NCCL kernels need free SMs, so they cannot start while attention or a matrix product occupies all of them. Copies
between GPUs with peer access run on copy engines and overlap with kernels.

:func:`get_peer_buffers` returns the buffers of a group. It returns None if the ranks are on several hosts, if a pair of
GPUs has no peer access, if ``cuda-bindings`` is missing, or if ``PORT_KIT_DISABLE_SYMM_MEM=1`` is set on any rank; the
caller then uses NCCL. Each stream has its own buffers::

    buffers = peers.next_buffers(x.shape, x.dtype)  # one buffer of this shape per rank
    for rank in peers.peer_ranks:
        buffers[rank].copy_(x)                      # uses a copy engine if both sides are contiguous
    peers.barrier()                                 # writes of all ranks to this rank are visible from here
    total = x + buffers[peers.rank]                 # for two ranks

A buffer must be read on the same stream before the next :meth:`PeerBuffers.barrier` on that stream, or before the one
after it with ``num_buffers=3``. Otherwise another rank may overwrite it.

A CUDA graph always uses the buffers that it was captured with. It therefore begins and ends between two rounds of all
buffers (:func:`complete_rounds`) and keeps their memory (:func:`allocated_memory`).
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from port_kit.parallel.comm import cuda_stream_ops
from port_kit.upstream.checks import require

logger = logging.getLogger(__name__)

#: Environment variable that disables symmetric memory if it is set to 1.
DISABLE_VARIABLE = "PORT_KIT_DISABLE_SYMM_MEM"
#: Bytes between the signal values of two ranks in a signal pad: one cache line each.
SIGNAL_STRIDE = 128
#: Maximum number of shapes whose views a buffer caches.
MAX_CACHED_SHAPES = 64
#: Totals of this process: ``calls`` of :meth:`PeerBuffers.barrier`, ``bytes`` of the buffers that were exchanged, and
#: ``memory``, the allocated bytes of this rank's buffers. PyTorch's memory statistics do not include the latter.
transfer_stats: Counter[str] = Counter()


class PeerMemory(Protocol):
    """Memory of equal size on each rank that all ranks can write to."""

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the first bytes of a rank's memory as a contiguous tensor."""

    def barrier(self) -> None:
        """Make the current stream wait for all ranks; their earlier writes are visible afterwards."""


class SymmetricMemory:
    """:class:`PeerMemory` in PyTorch symmetric memory.

    Ranks synchronize by a signal pad behind each buffer (:class:`~port_kit.parallel.comm.cuda_stream_ops.PeerSignals`).
    PyTorch's barrier is a kernel that occupies an SM while it waits.

    Args:
        size: bytes per rank.
        group: process group of the ranks.
    """

    def __init__(self, size: int, group: dist.ProcessGroup) -> None:
        require("symmetric_memory")
        from torch._C._distributed_c10d import _SymmetricMemory

        device = torch.device("cuda", torch.cuda.current_device())
        own, peers = group.rank(), [rank for rank in range(group.size()) if rank != group.rank()]
        pad_offset = -(-size // SIGNAL_STRIDE) * SIGNAL_STRIDE
        with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
            # PyTorch's pool may return different blocks on different ranks, so it is not used
            total = pad_offset + SIGNAL_STRIDE * group.size()
            self.own = _SymmetricMemory.empty_strided_p2p((total,), (1,), torch.uint8, device)
            self.own[pad_offset:].zero_()
            self.handle = _SymmetricMemory.rendezvous(self.own, group.group_name)
        pad = (group.size(), SIGNAL_STRIDE // 4), torch.int32, pad_offset // 4
        pads = [self.handle.get_buffer(rank, *pad) for rank in range(group.size())]
        self.signals = cuda_stream_ops.PeerSignals(
            outgoing=[pads[peer][own] for peer in peers], incoming=[pads[own][peer] for peer in peers]
        )
        # PyTorch 2.13 initializes the memory and its address table on a stream that no other stream waits for. All
        # ranks must finish that before any rank writes; otherwise they hang or fault sporadically.
        torch.cuda.synchronize(device)
        dist.barrier(group, device_ids=[device.index])

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See :class:`PeerMemory`."""
        view: Tensor = self.handle.get_buffer(rank, tuple(shape), dtype)
        return view

    def barrier(self) -> None:
        """See :class:`PeerMemory`."""
        self.signals.exchange()


class PeerBuffers:
    """Buffers of a group's ranks for one stream.

    All ranks must make the same calls in the same order.

    Args:
        rank: rank in the group.
        size: number of ranks.
        allocate: allocates the given number of bytes on each rank; a collective call.
        num_buffers: buffers per rank, used round-robin; at least 2, except in tests.
    """

    def __init__(self, rank: int, size: int, allocate: Callable[[int], PeerMemory], num_buffers: int = 2) -> None:
        self.rank, self.size = rank, size
        self.peer_ranks = [(rank + step) % size for step in range(1, size)]
        self._allocate = allocate
        self._memories: list[PeerMemory | None] = [None] * num_buffers
        self._sizes = [0] * num_buffers
        self._views: list[dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]]] = [{} for _ in range(num_buffers)]
        self._index = -1

    def next_buffers(self, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Return the next buffer of each rank as a contiguous tensor. Write to them until :meth:`barrier`."""
        self._index = (self._index + 1) % len(self._memories)
        key = (tuple(shape), dtype)
        views = self._views[self._index]
        if key not in views:
            if len(views) >= MAX_CACHED_SHAPES:
                views.clear()
            views[key] = self._make(*key)
        transfer_stats["bytes"] += views[key][self.rank].nbytes
        return views[key]

    def barrier(self) -> None:
        """Make the current stream wait until all ranks have written to the buffers returned last."""
        memory = self._memories[self._index]
        assert memory is not None  # next_buffers() was called before
        memory.barrier()
        transfer_stats["calls"] += 1

    def complete_round(self) -> None:
        """Make empty exchanges until the next buffer is the first one."""
        while (self._index + 1) % len(self._memories):
            known = self._memories[self._index + 1] is not None
            self.next_buffers((1 if known else self._sizes[self._index],), torch.uint8)
            self.barrier()

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        size = prod(shape) * dtype.itemsize
        memory = self._memories[self._index]
        if memory is None or size > self._sizes[self._index]:
            if memory is not None and torch.cuda.is_available():
                torch.cuda.synchronize()  # pending reads of the old memory
            self._views[self._index].clear()
            memory = self._memories[self._index] = self._allocate(size)
            transfer_stats["memory"] += size - self._sizes[self._index]
            self._sizes[self._index] = size
        return [memory.view(rank, shape, dtype) for rank in range(self.size)]

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All-gather tensors of equal shape along ``dim``. Read the result before the next barrier."""
        buffers = self.next_buffers((self.size, *x.shape), x.dtype)
        for buffer in buffers:
            buffer[self.rank].copy_(x)
        self.barrier()
        return buffers[self.rank].movedim(0, dim).flatten(dim, dim + 1)

    def exchange_partial_sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's tensor and the other rank's. Read the latter before the next barrier.

        Raises:
            ValueError: the group does not have two ranks.
        """
        if self.size != 2:
            raise ValueError(f"exchange_partial_sums needs 2 ranks, got {self.size}; use all_reduce")
        buffers = self.next_buffers(x.shape, x.dtype)
        buffers[1 - self.rank].copy_(x)
        self.barrier()
        return x, buffers[self.rank]


def get_peer_buffers(group: dist.ProcessGroup, x: Tensor, num_buffers: int = 2) -> PeerBuffers | None:
    """Return a group's buffers for the current stream, or None if symmetric memory is unavailable.

    Args:
        group: process group. The first call for a group is collective.
        x: tensor to send; the result is None if it is on a CPU.
        num_buffers: see :class:`PeerBuffers`.
    """
    if not x.is_cuda or not _have_peer_access(group):
        return None
    return _peer_buffers(group, torch.cuda.current_stream(x.device).cuda_stream, num_buffers)


def complete_rounds() -> None:
    """Let the next exchange on each stream use its first buffer. The current stream must have joined all others.

    All ranks must make this call together, as with exchanges.
    """
    for buffers in _created:
        buffers.complete_round()


def allocated_memory() -> list[PeerMemory]:
    """Return the memory behind all buffers. Who holds it may use its addresses after the buffers have grown."""
    return [memory for buffers in _created for memory in buffers._memories if memory is not None]


@contextmanager
def restored_on_error() -> Iterator[None]:
    """After an exception, continue with the buffers that were next before: no exchange of the body was executed."""
    before = [(buffers, buffers._index) for buffers in _created]
    try:
        yield
    except BaseException:
        for buffers, index in before:
            buffers._index = index
        raise


def is_enabled() -> bool:
    """Return True if symmetric memory is not disabled and ``cuda-bindings`` is installed."""
    return os.environ.get(DISABLE_VARIABLE) != "1" and cuda_stream_ops.is_installed()


#: All buffers of this process, in the order of their creation, which is equal on the ranks of a group.
_created: list[PeerBuffers] = []


@cache
def _peer_buffers(group: dist.ProcessGroup, _stream: int, num_buffers: int) -> PeerBuffers:
    buffers = PeerBuffers(group.rank(), group.size(), lambda size: SymmetricMemory(size, group), num_buffers)
    _created.append(buffers)
    return buffers


@cache
def _have_peer_access(group: dist.ProcessGroup) -> bool:
    """Return True if all pairs of ranks have peer access. Collective; equal on all ranks."""
    if group.size() == 1:
        return False
    here = (socket.gethostname(), torch.cuda.current_device(), is_enabled())
    ranks: list[Any] = [None] * group.size()
    dist.all_gather_object(ranks, here, group=group)
    wanted = all(rank[2] for rank in ranks)
    one_host = len({rank[0] for rank in ranks}) == 1
    reachable = wanted and one_host and all(_has_peer_access(here[1], rank[1]) for rank in ranks)
    answer = torch.tensor(int(reachable), device="cuda")
    dist.all_reduce(answer, dist.ReduceOp.MIN, group=group)
    if group.rank() == 0:
        logger.info("%d ranks exchange data through %s", group.size(), "symmetric memory" if answer.item() else "NCCL")
    return bool(answer.item())


def _has_peer_access(device: int, other: int) -> bool:
    visible = other < torch.cuda.device_count()
    return device == other or (visible and torch.cuda.can_device_access_peer(device, other))
