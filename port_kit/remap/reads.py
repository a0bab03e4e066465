"""Reading parts of safetensors files straight into memory that is there already, with a few threads.

Parts are copied from a mapping. Reading into the same memory is as fast where both addresses are alike modulo 32, which
the length of the header decides, and else takes half as long again or twice as long. Asking for the pages beforehand
makes nothing faster, nor does finding parts while others are copied. torch copies, because it is a fifth faster than
numpy at rows of a few kilobytes, which a column slice has; with one thread each, because the readers are the threads. A
thread takes the next piece when it is done with one, whichever tensor that is of.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from port_kit.manifest import ITEM_SIZES, SAFETENSORS_DTYPES, read_header
from port_kit.remap.boxes import Box, extents

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes that a thread reads at once: a single huge tensor is shared too.
PIECE = 1 << 23


@dataclass(frozen=True)
class Part:
    """A box of a source and the box of this rank's tensor that it fills.

    Attributes:
        source: the index of the source.
        local: the index of the tensor.
        perms: how the axes of the source's box change places on the way, in order.
        rows: extent of the tensor's box on its first axis, 1 where it has none.
    """

    source: tuple[slice, ...]
    local: tuple[slice, ...]
    perms: tuple[tuple[int, ...], ...]
    rows: int

    @classmethod
    def of(cls, source: Box, local: Box, perms: tuple[tuple[int, ...], ...]) -> Part:
        """A part by its boxes."""
        rows = extents(local)[0] if local else 1
        return cls(_index(source), _index(local), perms, rows)

    @cached_property
    def numel(self) -> int:
        """Elements of the box."""
        return math.prod(span.stop - span.start for span in self.source)


class File:
    """A safetensors file whose tensors are views of its mapping, as bits or as tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header, self._start = read_header(path)
        with path.open("rb") as stream:
            # a private mapping that may be written would be counted as memory: a file larger than that would be refused
            self._mapped = _unwarned(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        self._opened: Any = None

    def bits(self, name: str) -> Tensor:
        """A tensor as integers of its elements' size."""
        import numpy
        import torch

        entry = self._header[name]
        size = ITEM_SIZES[SAFETENSORS_DTYPES[entry["dtype"]]]
        start = self._start + entry["data_offsets"][0]
        return torch.from_numpy(numpy.ndarray(entry["shape"], f"i{size}", self._mapped, start))

    def tensor(self, name: str) -> Tensor:
        """A tensor of its own dtype."""
        from safetensors import safe_open

        if self._opened is None:
            self._opened = safe_open(self.path, framework="pt")
        return self._opened.get_tensor(name)


class Read(NamedTuple):
    """Some rows of a part, on their way from a file into a tensor of integers, the bits of the values."""

    file: File
    name: str
    part: Part
    target: Callable[[], Tensor]
    first: int
    last: int

    def run(self) -> None:
        """Copy it; the file's pages are read as they are touched."""
        import torch

        into = torch.atleast_1d(self.target()[self.part.local])
        piece = self.file.bits(self.name)[self.part.source]
        for perm in self.part.perms:
            piece = piece.permute(perm)
        rows = slice(self.first, self.last)
        into[rows].copy_(piece.reshape(into.shape)[rows])


def pieces(file: File, name: str, part: Part, nbytes: int, target: Callable[[], Tensor]) -> list[Read]:
    """The reads of a part of so many bytes, none of much more than :data:`PIECE`."""
    if nbytes <= PIECE:
        return [Read(file, name, part, target, 0, part.rows)]
    step = max(1, PIECE * part.rows // nbytes)
    return [Read(file, name, part, target, at, min(at + step, part.rows)) for at in range(0, part.rows, step)]


class Readers:
    """Threads that share reads, the calling one among them at the end; a context that ends them.

    Args:
        threads: at least 1; with 1 there is only the calling thread, and nothing is read before :meth:`finish`.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads={threads}: at least one thread has to read")
        import torch

        self._queue: SimpleQueue[Read | None] = SimpleQueue()
        self._failed = False
        self._torch_threads = torch.get_num_threads()
        alone = partial(torch.set_num_threads, 1)
        self._pool = ThreadPoolExecutor(threads - 1, "port-kit-read", alone) if threads > 1 else None
        self._others = [self._pool.submit(self._drain) for _ in range(threads - 1)] if self._pool is not None else []

    def __enter__(self) -> Readers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch

        self._failed = self._failed or kind is not None
        for _ in self._others:
            self._queue.put(None)
        if self._pool is not None:
            self._pool.shutdown()
        torch.set_num_threads(self._torch_threads)

    def put(self, read: Read) -> None:
        """Leave a read to whichever thread is free."""
        self._queue.put(read)

    def finish(self) -> None:
        """Do what is left; the first error ends all reads."""
        import torch

        for _ in range(len(self._others) + 1):
            self._queue.put(None)
        torch.set_num_threads(1)
        self._drain()
        for other in self._others:
            other.result()

    def _drain(self) -> None:
        try:
            while (read := self._queue.get()) is not None:
                if self._failed:
                    return
                read.run()
        except BaseException:
            self._failed = True
            raise


def _unwarned(mapped: mmap.mmap) -> ctypes.Array[ctypes.c_uint8]:
    """Return a mapping's bytes as torch takes them without a warning that they cannot be written; nobody does."""
    import numpy

    view = numpy.frombuffer(mapped, numpy.uint8)
    memory = (ctypes.c_uint8 * view.nbytes).from_address(view.ctypes.data)
    memory.view = view  # type: ignore[attr-defined]  # whoever holds the bytes holds the mapping
    return memory


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
