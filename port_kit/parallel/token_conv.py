"""Convolutions over tokens that are split over ranks, such as those in the feed-forward of an audio transformer.

Tokens are in the layout ``[B, T, C]``: a sequence, or a flattened grid of frames, rows and columns. Under sequence
parallelism each rank holds consecutive tokens. The ranks exchange the tokens at their edges, so each output equals that
of one rank, also where a kernel reaches over several ranks, and at padding. Under tensor parallelism the channels are
split.

The feed-forward of a block, with a kernel of 3 tokens::

    self.up = TokenConv(dim, hidden, 3, role="column")
    self.down = TokenConv(hidden, dim, 3, role="row")
    ...
    x = x + self.down(silu(self.up(x, length)), length)     # length: tokens of all ranks, without padding
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm_omni.diffusion.distributed.parallel_state import get_sequence_parallel_rank, get_sp_group

from port_kit.errors import ParallelError
from port_kit.parallel.halo import pad, with_halo
from port_kit.parallel.linear import sum_over_ranks
from port_kit.parallel.sequence import TOKENS, segment_counts, sequence_parallel_size, tokens_are_sharded
from port_kit.parallel.sharded_parameter import sharded_parameter

#: Channels that tensor parallelism splits, by name of the role.
Role = Literal["replicated", "column", "row", "grouped"]


class TokenConv(nn.Module):
    """Convolution over ``[B, T, C]`` with stride 1 and as many outputs as inputs; zeros precede and follow the tokens.

    Args:
        in_channels: channels of the input, over all tensor-parallel ranks.
        out_channels: channels of the output, over all tensor-parallel ranks.
        kernel_size: odd number of tokens; for a grid, odd numbers of frames, rows and columns.
        role: under tensor parallelism, ``"column"`` splits the output channels, ``"row"`` the input channels (they are
            already split; outputs are all-reduced), ``"grouped"`` the groups (input and output channels are split), and
            ``"replicated"`` nothing.
        dilation: distance of the kernel's tokens, or one per axis of a grid.
        groups: groups of channels; more than one needs the role ``"grouped"`` or ``"replicated"``.
        bias: add a bias.
        skip_sequence_parallel: each rank holds all tokens, such as those of a replicated text.

    Attributes:
        weight: ``[O, I / groups, k]`` as in ``nn.Conv1d``, or ``[O, I / groups, kt, kh, kw]`` as in ``nn.Conv3d``; this
            rank's part of the channels.
        bias: ``[O]`` or None.
        split_channels: channels or groups that tensor parallelism splits; None for the role ``"replicated"``.

    Raises:
        ParallelError: ``parallel_conv``; an even kernel, or groups that the role does not split. ``parallel_degree``;
            the tensor-parallel size does not divide the channels or groups.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        *,
        role: Role = "replicated",
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        skip_sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        shape = (kernel_size,) if isinstance(kernel_size, int) else kernel_size
        self.kernel = _axes(kernel_size)
        self.dilation = _axes(dilation, fill=None)
        self.reach = tuple(size // 2 * step for size, step in zip(self.kernel, self.dilation, strict=True))
        self.role, self.skip_sequence_parallel = role, skip_sequence_parallel
        self._check(groups)
        self.split_channels = {"column": out_channels, "row": in_channels, "grouped": groups, "replicated": None}[role]
        rank, ranks = (0, 1) if role == "replicated" else _tensor_rank_and_size()
        if (self.split_channels or ranks) % ranks:
            raise ParallelError(
                f"tensor parallelism on {ranks} ranks does not divide {self.split_channels} "
                f"{'groups' if role == 'grouped' else 'channels'} of a convolution",
                code="parallel_degree",
                hint="use a tensor-parallel size that divides them, or the role 'replicated'",
            )
        self.tp_size = ranks
        self.groups = groups // ranks if role == "grouped" else groups
        weight = torch.empty(out_channels, in_channels // groups, *shape)
        self.weight = sharded_parameter(weight, int(role == "row"), rank, ranks)
        parts = 1 if role == "row" else ranks
        self.bias = sharded_parameter(torch.empty(out_channels), 0, rank, parts) if bias else None

    def forward(
        self, x: Tensor, lengths: int | Sequence[int], *, segment: int = 0, grid: tuple[int, int] = (1, 1)
    ) -> Tensor:
        """Convolve this rank's tokens; the output at padding is zero. A collective call of the ranks of a sequence.

        Args:
            x: ``[B, T, I]``, this rank's tokens, with padding; all tokens outside of a sharded region.
            lengths: tokens of all ranks, without padding; one per segment if ``x`` is a segment of a longer sequence.
            segment: index of ``x`` in ``lengths``. Tokens beyond the segment are not read.
            grid: rows and columns of each frame; the tokens are ordered by frame, row and column.

        Returns:
            ``[B, T, O]``.

        Raises:
            ParallelError: ``parallel_tokens``; ``x`` has other tokens than this rank's part.
        """
        lengths = (lengths,) if isinstance(lengths, int) else tuple(lengths)
        counts, rank, gather = self._split(lengths, segment)
        self._check_tokens(x, counts, rank, lengths, segment, grid)
        reach = self.reach[0] * grid[0] * grid[1] + self.reach[1] * grid[1] + self.reach[2]
        given, before = with_halo(x, TOKENS, reach, counts, rank, gather)
        start = sum(counts[:rank])
        y = self._convolve(given, before, start, counts[rank], grid)
        return pad(self._combine(y), TOKENS, x.shape[TOKENS]).contiguous()

    def _split(
        self, lengths: tuple[int, ...], segment: int
    ) -> tuple[tuple[int, ...], int, Callable[[Tensor], Sequence[Tensor]]]:
        """Return the tokens of each rank, this rank, and the exchange of edges."""
        if self.skip_sequence_parallel or not tokens_are_sharded():
            return (lengths[segment],), 0, lambda edges: [edges]
        return segment_counts(lengths)[segment], get_sequence_parallel_rank(), _gather_edges

    def _convolve(self, given: Tensor, before: int, start: int, count: int, grid: tuple[int, int]) -> Tensor:
        """Return ``[B, count, O]`` for tokens ``start`` and following; ``given`` has ``before`` tokens before them."""
        if not count:
            return given.new_empty(given.shape[0], 0, self.weight.shape[0])
        bias = None if self.role == "row" and self.tp_size > 1 else self.bias
        if self.kernel[1:] == (1, 1):
            frame = grid[0] * grid[1]
            reach = self.reach[0] * frame
            x = _zero_pad(given, reach - before, 2 * reach + count)
            y = F.conv1d(x.mT, self.weight.flatten(2), bias, 1, 0, self.dilation[0] * frame, self.groups)
            return y.mT
        rows, columns = grid
        frame = rows * columns
        first, last = start // frame - self.reach[0], (start + count - 1) // frame + self.reach[0]
        x = _zero_pad(given, start - before - first * frame, (last - first + 1) * frame)
        cube = x.mT.unflatten(2, (-1, rows, columns))
        y = F.conv3d(cube, self.weight, bias, 1, (0, *self.reach[1:]), self.dilation, self.groups)
        return y.flatten(2).mT[:, start % frame :][:, :count]

    def _combine(self, y: Tensor) -> Tensor:
        """Add up the outputs of ranks that hold a part of the input channels."""
        if self.role != "row" or self.tp_size == 1:
            return y
        total = sum_over_ranks(y.contiguous()) if y.numel() else y
        return total if self.bias is None else total + self.bias

    def _check(self, groups: int) -> None:
        if any(size % 2 == 0 for size in self.kernel):
            raise ParallelError(
                f"a convolution over tokens has a kernel of {self.kernel} frames, rows and columns: expected odd sizes",
                code="parallel_conv",
                hint="a layer with an even kernel or a stride changes the number of tokens: run it before the tokens "
                "are sharded, or after they are gathered",
            )
        if groups > 1 and self.role in ("column", "row"):
            raise ParallelError(
                f"a convolution with {groups} groups has the role {self.role}: expected grouped or replicated",
                code="parallel_conv",
                hint="use role='grouped': input and output channels are both split by groups",
            )

    def _check_tokens(
        self,
        x: Tensor,
        counts: tuple[int, ...],
        rank: int,
        lengths: tuple[int, ...],
        segment: int,
        grid: tuple[int, int],
    ) -> None:
        """Check the number of tokens: padding follows the last segment only."""
        found, total, size = x.shape[TOKENS], sum(lengths), sequence_parallel_size()
        expected = [counts[rank]]
        if segment == len(lengths) - 1:
            padding = -total % size if len(counts) == 1 else -(-total // size) - _held(lengths, rank)
            expected.append(counts[rank] + padding)
        if found not in expected or lengths[segment] % (grid[0] * grid[1]):
            raise ParallelError(
                f"a convolution got {found} tokens on rank {rank} of {len(counts)}: expected {expected[-1]} of "
                f"{lengths[segment]}, in frames of {grid[0]} x {grid[1]}",
                code="parallel_tokens",
                hint="pass the unpadded lengths of the complete sequence, and shard its tokens at an SPBoundary; for "
                "tokens that each rank holds completely, use skip_sequence_parallel=True",
            )


def _held(lengths: tuple[int, ...], rank: int) -> int:
    """Return the tokens of a rank over all segments, without padding."""
    return sum(counts[rank] for counts in segment_counts(lengths))


def _axes(size: int | tuple[int, int, int], fill: int | None = 1) -> tuple[int, int, int]:
    """Return one number per axis of a grid; for a number, ``fill`` or the number itself for rows and columns."""
    if isinstance(size, tuple):
        return size
    return size, *((size if fill is None else fill,) * 2)


def _tensor_rank_and_size() -> tuple[int, int]:
    size = get_tensor_model_parallel_world_size()
    return (get_tensor_model_parallel_rank(), size) if size > 1 else (0, 1)


@torch.compiler.disable
def _gather_edges(edges: Tensor) -> Sequence[Tensor]:
    """All-gather over the ranks that share a sequence: Ulysses and Ring together."""
    group = get_sp_group()
    parts = [torch.empty_like(edges) for _ in range(group.world_size)]
    torch.distributed.all_gather(parts, edges.contiguous(), group=group.device_group)
    return parts


def _zero_pad(x: Tensor, before: int, size: int) -> Tensor:
    """Return ``[B, size, C]``: zeros, the tokens from ``before`` on, and zeros."""
    return F.pad(x, (0, 0, before, size - before - x.shape[TOKENS]))
