"""Interleaved execution of guidance branches on CUDA streams.

Ranks that share a branch communicate several times per block. The branches of a step are independent, so one branch
computes while the transfers of another are in progress (:mod:`~port_kit.parallel.comm.symm_mem`). Each branch is
assigned one of up to :data:`MAX_STREAMS` streams, and all branches advance block by block::

    streams = InterleavedStreams(x.device, branches=len(states))
    for block in blocks:
        for index, state in enumerate(states):
            with streams.stream(index):
                states[index] = block(state)
    streams.join()

With one branch, or on a CPU, everything runs on the current stream. Create tensors that branches share before
``InterleavedStreams(...)``: each stream waits for work launched earlier, and not for the other streams. Tensors need no
``record_stream`` as long as nothing is allocated on the current stream before :meth:`InterleavedStreams.join`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

#: Maximum number of streams per device.
MAX_STREAMS = 4


class InterleavedStreams:
    """Streams of one step's branches, from construction to :meth:`join`.

    Args:
        device: device of the branches.
        branches: number of branches.
    """

    def __init__(self, device: torch.device, branches: int) -> None:
        self.streams = _streams(device)[:branches] if device.type == "cuda" and branches > 1 else ()
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def stream(self, index: int) -> Iterator[None]:
        """Launch work on the stream of branch ``index``."""
        if not self.streams:
            yield
            return
        with torch.cuda.stream(self.streams[index % len(self.streams)]):
            yield

    def join(self) -> None:
        """Make the current stream wait for all branches."""
        for stream in self.streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)


def is_interleaved(device: torch.device) -> bool:
    """Return True if the current stream of a CUDA device is one of its interleaved streams."""
    return torch.cuda.current_stream(device) in _streams(device)


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(MAX_STREAMS))
