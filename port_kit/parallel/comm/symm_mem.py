"""What ranks of one host send each other through mailboxes in GPU memory, without NCCL's kernels.

NCCL copies with kernels. They take multiprocessors, and where attention and matrix products hold all of these, a
transfer begins when they end, even on a stream of its own. Between GPUs that can write into each other's memory,
PyTorch's symmetric memory lets a copy engine do it, while the multiprocessors go on with another pass.

:func:`get_peer_buffers` gives a group's mailboxes, or None where its ranks are not on one host, their GPUs do not reach
each other, NVIDIA's Python bindings are missing, or ``PORT_KIT_DISABLE_SYMM_MEM=1`` is set: then NCCL carries
everything. Groups are vLLM-Omni's own. Every stream has mailboxes of its own, so that what is sent on one never waits
for another::

    buffers = peers.next_buffers(x.shape, x.dtype)      # one mailbox a rank, of this shape on each
    for rank in peers.peer_ranks:
        buffers[rank].copy_(x)                  # written by a copy engine, where both sides are contiguous
    peers.barrier()                              # from here on what was written to this rank can be read
    total = x + buffers[peers.rank]             # of two ranks

What a mailbox holds must have been read, on the same stream, before the next :meth:`PeerBuffers.barrier` on that stream
(with a ``num_buffers`` of 3, before the one after): then its next writers cannot come too early.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from port_kit.parallel.comm import cuda_stream_ops

logger = logging.getLogger(__name__)

#: Set to 0, it leaves all transfers to NCCL.
DISABLE_VARIABLE = "PORT_KIT_DISABLE_SYMM_MEM"
#: Bytes between the numbers by which ranks meet.
SIGNAL_STRIDE = 128
#: Shapes of which a mailbox keeps its views.
MAX_CACHED_SHAPES = 64
#: Calls of :meth:`PeerBuffers.barrier` in this process, bytes of the mailboxes that they made readable, and the memory
#: that this rank's mailboxes take, in bytes. PyTorch's figures of allocated memory do not hold the last.
transfer_stats: Counter[str] = Counter()


class PeerMemory(Protocol):
    """Memory of the same size on each rank, to which all ranks can write."""

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the head of a rank's memory as a contiguous tensor."""

    def barrier(self) -> None:
        """Wait, on the current stream, until all ranks have come here on theirs; their writes are then seen."""


class SymmetricMemory:
    """:class:`PeerMemory` on GPUs, from PyTorch.

    Ranks meet by numbers that they write behind each other's memory and that the driver waits for. PyTorch's own
    barrier waits in a kernel: it holds a multiprocessor, and a kernel that wants all of them ends late.

    Args:
        size: bytes on each rank.
        group: whose ranks have it.
    """

    def __init__(self, size: int, group: dist.ProcessGroup) -> None:
        from torch._C._distributed_c10d import _SymmetricMemory

        device = torch.device("cuda", torch.cuda.current_device())
        self.rank, self.peer_ranks = group.rank(), [rank for rank in range(group.size()) if rank != group.rank()]
        numbers = -(-size // SIGNAL_STRIDE) * SIGNAL_STRIDE
        with torch.inference_mode(False):  # else it could only be written to in inference mode
            # not from PyTorch's pool of such memory: ranks could take different pieces of it for the same mailbox
            whole = numbers + SIGNAL_STRIDE * group.size()
            self.own = _SymmetricMemory.empty_strided_p2p((whole,), (1,), torch.uint8, device)
            self.own[numbers:].zero_()
            self.handle = _SymmetricMemory.rendezvous(self.own, group.group_name)
        place = (group.size(), SIGNAL_STRIDE // 4), torch.int32, numbers // 4
        self.signal_pads = [self.handle.get_buffer(rank, *place) for rank in range(group.size())]
        self.signal_value = 0
        # Without this, ranks hung or faulted now and then: PyTorch 2.13 seems to wipe the memory, and to upload its
        # addresses, on a stream that no other waits for. All must have that behind them before one writes to another.
        torch.cuda.synchronize(device)
        dist.barrier(group, device_ids=[device.index])

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See :class:`PeerMemory`."""
        view: Tensor = self.handle.get_buffer(rank, tuple(shape), dtype)
        return view

    def barrier(self) -> None:
        """See :class:`PeerMemory`."""
        self.signal_value += 1
        for rank in self.peer_ranks:
            cuda_stream_ops.stream_write_value(self.signal_pads[rank][self.rank], self.signal_value)
        for rank in self.peer_ranks:
            cuda_stream_ops.stream_wait_value(self.signal_pads[self.rank][rank], self.signal_value)


class PeerBuffers:
    """The mailboxes of a group's ranks for one stream.

    All ranks must make the same calls in the same order.

    Args:
        rank: this rank's place in the group.
        size: how many ranks the group has.
        allocate: gives memory of so many bytes on each rank; called by all ranks together.
        num_buffers: how many mailboxes a rank has; they are used in turns.
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
        """Return the next mailbox of every rank, by rank, as a contiguous tensor; :meth:`barrier` closes it."""
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
        """Wait, on the current stream, until every rank has written to the mailboxes that were taken last."""
        memory = self._memories[self._index]
        assert memory is not None  # next_buffers() comes first
        memory.barrier()
        transfer_stats["calls"] += 1

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        size = prod(shape) * dtype.itemsize
        memory = self._memories[self._index]
        if memory is None or size > self._sizes[self._index]:
            if memory is not None and torch.cuda.is_available():
                torch.cuda.synchronize()  # what is given back has been read
            self._views[self._index].clear()
            memory = self._memories[self._index] = self._allocate(size)
            transfer_stats["memory"] += size - self._sizes[self._index]
            self._sizes[self._index] = size
        return [memory.view(rank, shape, dtype) for rank in range(self.size)]

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Return the ranks' equally shaped tensors, joined along ``dim``; to be read before the next meeting."""
        buffers = self.next_buffers((self.size, *x.shape), x.dtype)
        for buffer in buffers:
            buffer[self.rank].copy_(x)
        self.barrier()
        return buffers[self.rank].movedim(0, dim).flatten(dim, dim + 1)

    def exchange_partial_sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's tensor and the other's, to be read before the next meeting; only for two ranks."""
        if self.size != 2:
            raise ValueError(f"the other of {self.size} ranks' summands was asked for; of more than two use all_reduce")
        buffers = self.next_buffers(x.shape, x.dtype)
        buffers[1 - self.rank].copy_(x)
        self.barrier()
        return x, buffers[self.rank]


def get_peer_buffers(group: dist.ProcessGroup, x: Tensor, num_buffers: int = 2) -> PeerBuffers | None:
    """Return the current stream's mailboxes of a group, or None where NCCL, or a CPU's backend, has to carry.

    Args:
        group: of vLLM-Omni; all its ranks call this at the same place.
        x: what is to be sent: on a CPU there are none.
        num_buffers: see :class:`PeerBuffers`.
    """
    if not x.is_cuda or not _have_peer_access(group):
        return None
    return _peer_buffers(group, torch.cuda.current_stream(x.device).cuda_stream, num_buffers)


def is_enabled() -> bool:
    """Whether mailboxes may be used where they can."""
    return os.environ.get(DISABLE_VARIABLE) != "1" and cuda_stream_ops.is_installed()


@cache
def _peer_buffers(group: dist.ProcessGroup, _stream: int, num_buffers: int) -> PeerBuffers:
    return PeerBuffers(group.rank(), group.size(), lambda size: SymmetricMemory(size, group), num_buffers)


@cache
def _have_peer_access(group: dist.ProcessGroup) -> bool:
    """Whether each rank can write to the memory of each other; all ranks come to the same answer."""
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
        logger.info("%d ranks exchange through %s", group.size(), "peer memory" if answer.item() else "NCCL")
    return bool(answer.item())


def _has_peer_access(device: int, other: int) -> bool:
    visible = other < torch.cuda.device_count()
    return device == other or (visible and torch.cuda.can_device_access_peer(device, other))
