"""A second CUDA stream for the audio half of a block, whose kernels are too small to fill a GPU.

Both halves of a block are independent between two points: where each has read the latents, and where each reads the
other. Between them the audio half runs beside the video half::

    with side_stream.fork(v):
        a = audio half ...        # on the second stream
    v = video half ...            # on the first
    side_stream.join(v)                 # from here on both may be read

On one GPU this gains half a percent, since the whole chip works at its limit of power. It is there for ranks that share
the video tokens: audio has too few for its part to get shorter, and fills the time in which video waits. Under HSDP
the first kernels of a block wait for its parameters anyway, and a step took 1.5 % longer: there it is off. So it is
where passes take turns (:mod:`~port_kit.parallel.comm.stream_interleave`): then each has another beside it.

Memory is safe without further marks as long as a block joins before it returns: the second stream waits for the first
whenever it is entered, so what either allocator gets back is not used again before the other has read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from port_kit.parallel.comm.stream_interleave import InterleavedStreams


@dataclass(frozen=True)
class SideStream:
    """The two streams of a device.

    Attributes:
        two: whether there are two; else everything is launched on the current one.
    """

    enabled: bool = True

    @contextmanager
    def fork(self, x: Tensor) -> Iterator[None]:
        """Launch what is inside on the second stream of the device of ``x``, after all that was launched so far."""
        if not self._is_used(x):
            yield
            return
        side = _side_stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            yield

    def join(self, x: Tensor) -> None:
        """Make the current stream wait for what was launched on the second."""
        if self._is_used(x):
            torch.cuda.current_stream(x.device).wait_stream(_side_stream(x.device))

    def _is_used(self, x: Tensor) -> bool:
        return self.enabled and x.is_cuda and not InterleavedStreams.active


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # Its few blocks go first wherever a multiprocessor gets free, so that it is never the one waited for.
    return torch.cuda.Stream(device, priority=-1)
