"""Exchange of the edges of a sharded dimension, for modules that read neighboring tokens.

Each rank holds consecutive tokens: any number of them, also none. A halo may be longer than a neighbor's part; it then
comes from several ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def with_halo(
    x: Tensor, dim: int, halo: int, counts: Sequence[int], rank: int, all_gather: Callable[[Tensor], Sequence[Tensor]]
) -> tuple[Tensor, int]:
    """Return this rank's tokens between up to ``halo`` tokens of the ranks before and after it. A collective call.

    Args:
        x: this rank's tokens along ``dim``; those from ``counts[rank]`` on are padding.
        dim: dimension of the tokens.
        halo: tokens to add on each side; fewer are added at the ends of the sequence.
        counts: tokens of each rank, without padding, the same on all ranks.
        rank: this rank.
        all_gather: returns the tensors of all ranks, which have equal shapes.

    Returns:
        The tokens without padding, and the number of those that come before this rank's.
    """
    own = x.narrow(dim, 0, counts[rank])
    width = min(halo, max(counts))
    if not width:
        return own, 0
    edge = min(width, counts[rank])
    ends = own.narrow(dim, 0, edge), own.narrow(dim, counts[rank] - edge, edge)
    edges = all_gather(torch.stack([pad(end, dim, width) for end in ends]))
    before = _nearest(edges, 1, dim, halo, [min(width, count) for count in counts[:rank]])
    after = _nearest(edges, 0, dim, halo, [min(width, count) for count in counts[:rank:-1]])
    parts = [*reversed(before), own, *after]
    return torch.cat(parts, dim) if len(parts) > 1 else own, sum(part.shape[dim] for part in before)


def _nearest(edges: Sequence[Tensor], side: int, dim: int, halo: int, counts: Sequence[int]) -> list[Tensor]:
    """Return the tokens next to this rank on one side, the nearest rank's first.

    Args:
        edges: by rank: its first and its last tokens, padded.
        side: 1 for the last tokens of the ranks before this one, 0 for the first tokens of those after it.
        dim: dimension of the tokens.
        halo: tokens that are needed.
        counts: tokens in the edges of the ranks before this one, first to last; of those after it, last to first.
    """
    found = []
    for distance, count in enumerate(reversed(counts)):
        rank = len(counts) - 1 - distance if side else len(edges) - len(counts) + distance
        take = min(halo, count)
        if take:
            found.append(edges[rank][side].narrow(dim, count - take if side else 0, take))
        halo -= take
    return found


def pad(x: Tensor, dim: int, size: int) -> Tensor:
    """Append zeros along a dimension up to ``size``."""
    if x.shape[dim] == size:
        return x
    shape = list(x.shape)
    shape[dim] = size - x.shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)
