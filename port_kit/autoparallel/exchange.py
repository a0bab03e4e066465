"""Collectives of a plan: over vLLM-Omni's sequence-parallel group, or over threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Exchange(Protocol):
    """Collectives among the ranks that shard tokens.

    Attributes:
        rank: rank in the group.
        world: number of ranks.
    """

    rank: int
    world: int

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, which have equal shapes."""

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send ``parts[i]`` to rank i; return what each rank sent. All parts have equal shapes."""


class GroupExchange:
    """Collectives over a process group.

    Args:
        group: process group; None is a group of one rank.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = torch.distributed.get_rank(group) if group is not None else 0
        self.world = torch.distributed.get_world_size(group) if group is not None else 1

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """See :class:`Exchange`."""
        if self.world == 1:
            return [x]
        plain = as_plain(x)
        parts = [torch.empty_like(plain) for _ in range(self.world)]
        torch.distributed.all_gather(parts, plain, group=self.group)
        return [like(part, x) for part in parts]

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """See :class:`Exchange`."""
        if self.world == 1:
            return list(parts)
        sent = torch.stack(list(parts)).contiguous()
        received = torch.empty_like(sent)
        torch.distributed.all_to_all_single(received, sent, group=self.group)
        return list(received)


class ThreadWorld:
    """Ranks that are threads of one process, to try a plan without process groups.

    Args:
        size: number of ranks.
        timeout: seconds that a rank waits for the others before all of them fail.
    """

    def __init__(self, size: int, timeout: float = 20.0) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.shared: list[Any] = [None] * size

    def trade(self, rank: int, value: Any) -> list[Any]:
        """Return the values that all ranks pass."""
        self.shared[rank] = value
        self.barrier.wait()
        values = list(self.shared)
        self.barrier.wait()
        return values


class ThreadExchange:
    """Collectives of one rank of a :class:`ThreadWorld`."""

    def __init__(self, world: ThreadWorld, rank: int) -> None:
        self.threads, self.rank, self.world = world, rank, world.size

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """See :class:`Exchange`."""
        return self.threads.trade(self.rank, x)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """See :class:`Exchange`."""
        return [sent[self.rank] for sent in self.threads.trade(self.rank, list(parts))]


def as_plain(x: Tensor) -> Tensor:
    """Return a contiguous tensor of a dtype that collectives support: booleans as bytes, complex as real pairs."""
    if x.dtype is torch.bool:
        return x.to(torch.uint8).contiguous()
    return torch.view_as_real(x).contiguous() if x.is_complex() else x.contiguous()


def like(plain: Tensor, x: Tensor) -> Tensor:
    """Undo :func:`as_plain`."""
    if x.dtype is torch.bool:
        return plain.bool()
    return torch.view_as_complex(plain) if x.is_complex() else plain
