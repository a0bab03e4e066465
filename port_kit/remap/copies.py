"""Copying tensors in host memory: bits through numpy, which moves them faster than torch's elementwise copy.

torch's threads wait for each other by spinning, tensor by tensor, and so slow each other down where other work shares
the cores; the threads here sleep while they have nothing to do.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

#: Bytes below which finding a faster way costs more than the copy.
SMALL = 1 << 16
#: Bytes below which handing a part to another thread costs more than it saves.
SHARED = 1 << 20
#: Bytes that a thread copies at once where many tensors are put by: a single huge one is shared too.
PIECE = 1 << 23

Pair = tuple["NDArray[Any]", "NDArray[Any]"]
"""Where to, and what: two arrays of integers of equal shape, the bits of the values."""


class Copies:
    """Copies with a number of threads, the calling one among them; a context that ends its threads.

    Args:
        threads: at least 1; with 1 there is only the calling thread.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads={threads}: at least one thread has to copy")
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, "port-kit-copy") if threads > 1 else None
        self._later: deque[Pair] = deque()

    def __enter__(self) -> Copies:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def copy(self, place: Tensor, piece: Tensor) -> None:
        """Write ``piece`` to ``place``, of equal shape; done when this returns."""
        pair = bits(place, piece)
        if pair is None:
            place.copy_(piece)
        elif self._pool is None or piece.nbytes < SHARED:
            _move(pair)
        else:
            into, values = pair
            rows = -(-len(values) // self.threads)
            parts = [(into[at : at + rows], values[at : at + rows]) for at in range(0, len(values), rows)]
            running = [self._pool.submit(_move, part) for part in parts[1:]]
            _move(parts[0])
            for other in running:
                other.result()

    def put_by(self, into: NDArray[Any], values: NDArray[Any]) -> None:
        """Remember a copy for :meth:`run`; both arrays have integers of the values' size."""
        rows = max(1, PIECE * len(values) // max(values.nbytes, 1))
        for at in range(0, len(values), rows):
            self._later.append((into[at : at + rows], values[at : at + rows]))

    def run(self) -> None:
        """Copy what was put by; a thread takes the next when it is done with one."""
        others = [self._pool.submit(self._drain) for _ in range(self.threads - 1)] if self._pool is not None else []
        self._drain()
        for other in others:
            other.result()

    def _drain(self) -> None:
        while True:
            try:
                pair = self._later.popleft()
            except IndexError:
                return
            _move(pair)


def bits(place: Tensor, piece: Tensor) -> Pair | None:
    """Both tensors as arrays of integers where a copy moves bits in host memory and no more; else None."""
    import torch

    if piece.nbytes < SMALL or type(place) is not torch.Tensor or type(piece) is not torch.Tensor:
        return None  # a subclass (DTensor) keeps its elements in ways of its own
    if place.dtype != piece.dtype or place.shape != piece.shape or not (place.is_cpu and piece.is_cpu):
        return None
    if piece.is_complex() or place.stride(-1) != 1 or piece.stride(-1) != 1:
        return None
    integer = getattr(torch, f"int{8 * piece.element_size()}")
    return place.view(integer).numpy(), piece.view(integer).numpy()


def _move(pair: Pair) -> None:
    import numpy

    numpy.copyto(*pair)
