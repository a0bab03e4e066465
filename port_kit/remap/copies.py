"""Copying many tensors in host memory with a few threads.

torch's threads wait for each other at the end of every tensor, spinning; here a thread takes the next piece when it is
done with one, whichever tensor that is of.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bytes that a thread copies at once: a single huge tensor is shared too.
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


def _move(pair: Pair) -> None:
    import numpy

    numpy.copyto(*pair)
