"""Token streams of one forward: their lengths, and how tensors are sharded and gathered.

Each rank holds ``ceil(n / ranks)`` consecutive tokens of a stream of n tokens. The last ranks are padded with zeros. A
dimension that consists of several streams holds this rank's part of each, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from port_kit.autoparallel.exchange import Exchange
from port_kit.autoparallel.plan import TokenAxis
from port_kit.autoparallel.tree import rebuild
from port_kit.errors import ParallelError

#: A part of a dimension that is complete on every rank.
WHOLE = "*"


class Tokens:
    """State of one forward.

    Args:
        exchange: ranks that shard tokens.

    Attributes:
        lengths: tokens per stream, over all ranks.
        sharded: True between the blocks that shard and gather.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.lengths: dict[str, int] = {}
        self.sharded = False

    def reset(self) -> None:
        """Forget the lengths, at the start of a forward."""
        self.lengths = {}
        self.sharded = False

    def total(self, streams: Sequence[str]) -> int:
        """Return the number of tokens of all ranks."""
        return sum(self.lengths[stream] for stream in streams)

    def local(self, stream: str) -> int:
        """Return the number of tokens of each rank, with padding."""
        return -(-self.lengths[stream] // self.exchange.world)

    def local_total(self, streams: Sequence[str]) -> int:
        """Return the number of tokens of each rank, with padding."""
        return sum(map(self.local, streams))

    def valid(self, stream: str, rank: int) -> int:
        """Return the number of tokens of a rank, without padding."""
        share = self.local(stream)
        return min(max(self.lengths[stream] - rank * share, 0), share)

    def learn(self, axes: Sequence[TokenAxis], value: Any) -> None:
        """Read the lengths of streams that are not yet known from complete arguments."""
        sizes: dict[str, int] = {}

        def note(path: str, leaf: Any) -> Any:
            for axis in axes:
                if axis.path == path and leaf is not None:
                    sizes[path] = leaf if axis.dim < 0 else leaf.shape[axis.dim]
            return leaf

        rebuild(value, note)
        for axis in sorted(axes, key=lambda axis: len(axis.streams)):
            unknown = [stream for stream in axis.streams if stream not in self.lengths]
            if axis.path in sizes and len(unknown) == 1:
                known = [stream for stream in axis.streams if stream in self.lengths]
                self.lengths[unknown[0]] = sizes[axis.path] - self.total(known)

    def shard_all(self, axes: Sequence[TokenAxis], value: Any) -> Any:
        """Shard the leaves that have an axis and are complete."""
        return self._apply(axes, value, self.shard, self.total, self.local_total)

    def gather_all(self, axes: Sequence[TokenAxis], value: Any) -> Any:
        """Gather the leaves that have an axis and are sharded."""
        return self._apply(axes, value, self.gather, self.local_total, self.total)

    def _apply(self, axes: Sequence[TokenAxis], value: Any, change: Any, before: Any, after: Any) -> Any:
        table = {axis.path: axis for axis in axes}

        def one(path: str, leaf: Any) -> Any:
            axis = table.get(path)
            if axis is None or leaf is None:
                return leaf
            if axis.dim < 0:
                return after(axis.streams) if leaf == before(axis.streams) else leaf
            return change(leaf, axis.dim, axis.streams)

        return rebuild(value, one)

    def shard(self, x: Tensor, dim: int, streams: Sequence[str]) -> Tensor:
        """Return this rank's tokens of a complete tensor; one that is sharded already is returned as it is.

        Raises:
            ParallelError: ``plan_tokens``; the dimension has neither length.
        """
        if x.shape[dim] == self.local_total(streams):
            return x
        self._require(x, dim, self.total(streams), streams)
        parts = x.split([self.lengths[stream] for stream in streams], dim)
        return _concat([self._own(part, dim, stream) for part, stream in zip(parts, streams, strict=True)], dim)

    def _own(self, x: Tensor, dim: int, stream: str) -> Tensor:
        share, rank = self.local(stream), self.exchange.rank
        valid = self.valid(stream, rank)
        own = x.narrow(dim, min(rank * share, x.shape[dim]), valid)
        return own if valid == share else pad(own, dim, share)

    def gather(self, x: Tensor, dim: int, streams: Sequence[str]) -> Tensor:
        """Return the tokens of all ranks, in order and without padding; a complete tensor is returned as it is.

        Raises:
            ParallelError: ``plan_tokens``; the dimension has neither length.
        """
        if x.shape[dim] == self.total(streams) and self.total(streams) != self.local_total(streams):
            return x
        self._require(x, dim, self.local_total(streams), streams)
        return self.join(self.exchange.all_gather(x), dim, streams)

    def join(self, parts: Sequence[Tensor], dim: int, streams: Sequence[str]) -> Tensor:
        """Return the tokens of all ranks in order, without padding, from each rank's part."""
        shares = [self.local(stream) for stream in streams]
        split = [part.split(shares, dim) for part in parts]
        pieces = [
            split[rank][index].narrow(dim, 0, self.valid(stream, rank))
            for index, stream in enumerate(streams)
            for rank in range(self.exchange.world)
        ]
        return _concat(pieces, dim)

    def spread(self, x: Tensor, dim: int, streams: Sequence[str]) -> list[Tensor]:
        """Return every rank's padded part of a complete tensor: the inverse of :meth:`join`."""
        whole = x.split([self.lengths[stream] for stream in streams], dim)
        ranks = range(self.exchange.world)
        padded = [
            pad(part, dim, self.local(stream) * len(ranks)).split(self.local(stream), dim)
            for part, stream in zip(whole, streams, strict=True)
        ]
        return [_concat([part[rank] for part in padded], dim) for rank in ranks]

    def _require(self, x: Tensor, dim: int, size: int, streams: Sequence[str]) -> None:
        if x.shape[dim] != size:
            raise ParallelError(
                f"{'+'.join(streams)}: expected {size} tokens in dimension {dim}, got {x.shape[dim]}",
                code="plan_tokens",
                hint="infer the plan from inputs of this kind: port-kit plan infer CLASS -o FILE",
                shape=list(x.shape),
            )


def pad(x: Tensor, dim: int, size: int) -> Tensor:
    """Append zeros along a dimension."""
    if x.shape[dim] == size:
        return x
    shape = list(x.shape)
    shape[dim] = size - x.shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


def _concat(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
