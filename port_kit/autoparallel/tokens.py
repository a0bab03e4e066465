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
from port_kit.parallel.halo import pad, with_halo

#: A part of a dimension that is complete on every rank.
WHOLE = "*"


class Tokens:
    """State of one forward.

    Args:
        exchange: ranks that shard tokens.

    Attributes:
        lengths: tokens per stream, over all ranks.
        rows: rows of the grid per stream, for streams that are sharded by rows.
        sharded: True between the blocks that shard and gather.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.lengths: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self.sharded = False

    def reset(self) -> None:
        """Forget the lengths, at the start of a forward."""
        self.lengths, self.rows = {}, {}
        self.sharded = False

    def size(self, stream: str, grid: int = 1) -> int:
        """Return the tokens of all ranks, or their rows for a dimension that holds the rows of a grid."""
        return self.rows[stream] if grid > 1 else self.lengths[stream]

    def total(self, streams: Sequence[str], grid: int = 1) -> int:
        """Return the number of tokens or rows of all ranks."""
        return sum(self.size(stream, grid) for stream in streams)

    def local(self, stream: str, grid: int = 1) -> int:
        """Return the number of tokens or rows of each rank, with padding."""
        if stream not in self.rows:
            return -(-self.lengths[stream] // self.exchange.world)
        rows = -(-self.rows[stream] // self.exchange.world)
        return rows if grid > 1 else rows * (self.lengths[stream] // self.rows[stream])

    def local_total(self, streams: Sequence[str], grid: int = 1) -> int:
        """Return the number of tokens or rows of each rank, with padding."""
        return sum(self.local(stream, grid) for stream in streams)

    def valid(self, stream: str, rank: int, grid: int = 1) -> int:
        """Return the number of tokens or rows of a rank, without padding."""
        share = self.local(stream, grid)
        return min(max(self.size(stream, grid) - rank * share, 0), share)

    def learn(self, axes: Sequence[TokenAxis], value: Any) -> None:
        """Read the lengths of streams that are not yet known from complete arguments."""
        sizes: dict[str, int] = {}
        table = {axis.path: axis for axis in axes}

        def note(path: str, leaf: Any) -> Any:
            axis = table.get(path)
            if axis is not None and leaf is not None:
                sizes[path] = leaf if axis.dim < 0 else leaf.shape[axis.dim]
            return leaf

        rebuild(value, note)
        for axis in sorted(axes, key=lambda axis: len(axis.streams)):
            known = self.lengths if axis.grid == 1 else self.rows
            unknown = [stream for stream in axis.streams if stream not in known]
            if axis.path in sizes and len(unknown) == 1:
                rest = [stream for stream in axis.streams if stream in known]
                known[unknown[0]] = sizes[axis.path] - sum(known[stream] for stream in rest)

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
                return after(axis.streams, axis.grid) if leaf == before(axis.streams, axis.grid) else leaf
            return change(leaf, axis.dim, axis.streams, axis.grid)

        return rebuild(value, one)

    def shard(self, x: Tensor, dim: int, streams: Sequence[str], grid: int = 1) -> Tensor:
        """Return this rank's tokens of a complete tensor; one that is sharded already is returned as it is.

        Raises:
            ParallelError: ``plan_tokens``; the dimension has neither length.
        """
        if x.shape[dim] == self.local_total(streams, grid):
            return x
        self._require(x, dim, self.total(streams, grid), streams)
        parts = x.split([self.size(stream, grid) for stream in streams], dim)
        return _concat([self._own(part, dim, s, grid) for part, s in zip(parts, streams, strict=True)], dim)

    def _own(self, x: Tensor, dim: int, stream: str, grid: int) -> Tensor:
        share, rank = self.local(stream, grid), self.exchange.rank
        valid = self.valid(stream, rank, grid)
        own = x.narrow(dim, min(rank * share, x.shape[dim]), valid)
        return own if valid == share else pad(own, dim, share)

    def gather(self, x: Tensor, dim: int, streams: Sequence[str], grid: int = 1) -> Tensor:
        """Return the tokens of all ranks, in order and without padding; a complete tensor is returned as it is.

        Raises:
            ParallelError: ``plan_tokens``; the dimension has neither length.
        """
        total, local = self.total(streams, grid), self.local_total(streams, grid)
        if x.shape[dim] == total and total != local:
            return x
        self._require(x, dim, local, streams)
        return self.join(self.exchange.all_gather(x), dim, streams, grid)

    def join(self, parts: Sequence[Tensor], dim: int, streams: Sequence[str], grid: int = 1) -> Tensor:
        """Return the tokens of all ranks in order, without padding, from each rank's part."""
        shares = [self.local(stream, grid) for stream in streams]
        split = [part.split(shares, dim) for part in parts]
        pieces = [
            split[rank][index].narrow(dim, 0, self.valid(stream, rank, grid))
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

    def with_halo(self, x: Tensor, dim: int, stream: str, halo: int, grid: int) -> tuple[Tensor, int]:
        """Return this rank's rows between up to ``halo`` rows of its neighbors, and the number of those before them.

        Args:
            x: this rank's rows of a grid, or its tokens, with padding.
            dim: dimension of the rows.
            stream: stream that is sharded.
            halo: rows to add on both sides.
            grid: dimensions of the grid; 1 if the rows are tokens.
        """
        counts = [self.valid(stream, rank, grid) for rank in range(self.exchange.world)]
        return with_halo(x, dim, halo, counts, self.exchange.rank, self.exchange.all_gather)

    def _require(self, x: Tensor, dim: int, size: int, streams: Sequence[str]) -> None:
        if x.shape[dim] != size:
            raise ParallelError(
                f"{'+'.join(streams)}: expected {size} tokens in dimension {dim}, got {x.shape[dim]}",
                code="plan_tokens",
                hint="infer the plan from inputs of this kind: port-kit plan infer CLASS -o FILE",
                shape=list(x.shape),
            )


def _concat(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
