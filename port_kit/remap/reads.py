"""Reading parts of safetensors files straight into memory that is there already, with a few threads.

Parts are copied from a mapping. Reading into the same memory is as fast where both addresses are alike modulo 32, which
the length of the header decides, and else takes half as long again or twice as long. Asking for the pages beforehand
makes nothing faster. torch copies, because it is a fifth faster than numpy at rows of a few kilobytes, which a column
slice has; with one thread each, because the readers are the threads. A thread takes the next batch when it is done with
one, whichever tensors those are of.

Only one thread at a time runs Python, and after a copy of megabytes nothing of it is left in the processor's caches. So
where parts lie in memory is worked out once for all layers, the calling thread makes all views while the others copy
already, and a batch of views is one call.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from queue import SimpleQueue
from types import EllipsisType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from port_kit.checkpoint.dtypes import ITEM_SIZES
from port_kit.errors import RemapError
from port_kit.manifest import Manifest, stamp
from port_kit.remap.boxes import Box, Shape, extents

if TYPE_CHECKING:
    from torch import Tensor

_madvise = ctypes.CDLL(None).madvise

#: Bytes that a thread reads at once, up to twice as many: a single huge tensor is shared too.
PIECE = 1 << 22
#: Bytes that a thread begins with. While it copies them, views of some hundred tensors are made; else it would wait for
#: the interpreter after every megabyte.
FIRST = 1 << 25
#: Bytes of a file after which those before are unmapped.
LEFT = 1 << 26


@dataclass(frozen=True)
class Part:
    """A box of a source and the box of this rank's tensor that it fills.

    Attributes:
        source: the box in the source.
        local: the box in the tensor.
        perms: how the axes of the source's box change places on the way, in order.
    """

    source: Box
    local: Box
    perms: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def numel(self) -> int:
        """Elements of the box."""
        return math.prod(stop - start for start, stop in self.source)


class Window(NamedTuple):
    """What a box is in memory: extents, and steps and start in elements."""

    size: Shape
    stride: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, box: Box, stride: Sequence[int]) -> Window:
        """The window of a box of a tensor with these strides."""
        return cls(extents(box), tuple(stride), sum(at * step for (at, _), step in zip(box, stride, strict=True)))

    def permuted(self, perm: tuple[int, ...]) -> Window:
        """The same elements, axis i being this one's axis ``perm[i]``."""
        return Window(tuple(self.size[axis] for axis in perm), tuple(self.stride[axis] for axis in perm), self.start)

    def rows(self, first: int, last: int) -> Window:
        """A span of the first axis."""
        return Window((last - first, *self.size[1:]), self.stride, self.start + first * self.stride[0])

    def view(self, tensor: Tensor, at: int) -> Tensor:
        """These elements of a tensor's memory, counted from an element of it."""
        return tensor.as_strided(self.size, self.stride, at + self.start)


class Cut(NamedTuple):
    """Some rows of a part, as windows.

    Attributes:
        source: of the source; all rows where they have to be reshaped.
        target: of this rank's tensor.
        nbytes: bytes that are read.
        reshaped: the shape that the part takes on, None where it has that already, and its rows that are wanted then.
    """

    source: Window
    target: Window
    nbytes: int
    reshaped: Shape | None = None
    rows: slice | EllipsisType = ...


def cuts(part: Part, shape: Shape, stride: Sequence[int], size: int) -> list[Cut]:
    """A part in pieces of no more than twice :data:`PIECE` bytes, as far as its rows allow.

    Args:
        part: the part.
        shape: the whole source's.
        stride: that of this rank's tensor, in elements.
        size: bytes of an element.
    """
    source = Window.of(part.source, [math.prod(shape[axis + 1 :]) for axis in range(len(shape))])
    for perm in part.perms:
        source = source.permuted(perm)
    target = Window.of(part.local, stride)
    reshaped = None if source.size == target.size else target.size
    nbytes = part.numel * size
    rows = target.size[0] if target.size else 1
    count = min(rows, nbytes // PIECE)
    if count < 2:
        return [Cut(source, target, nbytes, reshaped)]
    found = []
    for at in range(count):
        first, last = rows * at // count, rows * (at + 1) // count
        mine, span = target.rows(first, last), nbytes * (last - first) // rows
        if reshaped is None:
            found.append(Cut(source.rows(first, last), mine, span))
        else:
            found.append(Cut(source, mine, span, reshaped, slice(first, last)))
    return found


class File:
    """A safetensors file whose tensors are views of its mapping, as bits or as tensors.

    Args:
        root: the folder of the checkpoint.
        file: the file's name in the manifest.
        source: the manifest of the checkpoint.

    Raises:
        RemapError: ``manifest_invalid`` where the file is another than the one whose header was read.
    """

    def __init__(self, root: Path, file: str, source: Manifest) -> None:
        self.path = path = root / file
        self._source = source
        with path.open("rb") as stream:
            if stamp(stream.fileno()) != source.stamps[file]:
                raise RemapError(
                    f"{path} was changed or replaced after its header was read",
                    code="manifest_invalid",
                    hint="load it when nothing writes to it any more",
                )
            # a private mapping that may be written would be counted as memory: a file larger than that would be refused
            self._mapped = _unwarned(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        self._bits: dict[tuple[int, int], Tensor] = {}
        self._reached = self._left = self._leaving = 0
        self._opened: Any = None

    def bits(self, name: str) -> tuple[Tensor, int]:
        """The file as integers of the size of a tensor's elements, and where the tensor starts among them."""
        size, start = ITEM_SIZES[self._source[name].dtype], self._source.places[name]
        self._reached = max(self._reached, start)
        at, phase = divmod(start, size)  # tensors of small elements may leave others at odd addresses
        if (size, phase) not in self._bits:
            import numpy
            import torch

            count = (len(self._mapped) - phase) // size
            self._bits[size, phase] = torch.from_numpy(numpy.ndarray(count, f"i{size}", self._mapped, phase))
        return self._bits[size, phase], at

    def tensor(self, name: str) -> Tensor:
        """A tensor of its own dtype."""
        from safetensors import safe_open

        if self._opened is None:
            self._opened = safe_open(self.path, framework="pt")
        return self._opened.get_tensor(name)

    def left(self) -> Callable[[], object] | None:
        """What unmaps a part that was asked for a while ago; None where that is too little to be worth a call.

        At the end it would take milliseconds for gigabytes, and nothing is copied meanwhile. What is touched again is
        mapped again.
        """
        if self._reached - self._leaving < LEFT:
            return None
        start, stop = self._left, self._leaving
        self._left, self._leaving = stop, self._reached // mmap.PAGESIZE * mmap.PAGESIZE
        return partial(_unmap, self._mapped, start, stop)


class Read(NamedTuple):
    """Cuts of a tensor on their way from a file into a tensor, whose bits they fill."""

    file: File
    name: str
    target: Tensor
    cuts: Sequence[Cut]

    def views(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Where bits go, the mapped bits, whose pages are read as they are touched, and how many bytes they are."""
        import torch

        bits, start = self.file.bits(self.name)
        into = self.target.view(getattr(torch, f"int{8 * bits.element_size()}"))
        at = into.storage_offset()
        for cut in self.cuts:
            piece = cut.source.view(bits, start)
            if cut.reshaped is not None:
                piece = piece.reshape(cut.reshaped)[cut.rows]
            yield cut.target.view(into, at), piece, cut.nbytes


class Readers:
    """Threads that share reads, the calling one among them at the end; a context that ends them.

    Args:
        threads: at least 1; with 1 there is only the calling thread, and nothing is read before :meth:`finish`.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads={threads}: at least one thread has to read")
        import torch

        self._queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._into: list[Tensor] = []
        self._pieces: list[Tensor] = []
        self._nbytes = 0
        self._failed = False
        self._torch_threads = torch.get_num_threads()
        self._threads = threads
        alone = partial(torch.set_num_threads, 1)
        self._pool = ThreadPoolExecutor(threads - 1, "port-kit-read", alone) if threads > 1 else None
        self._others: list[Future[None]] = []

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
        """Leave a read to whichever thread is free, together with others where it is small."""
        for into, piece, nbytes in read.views():
            self._into.append(into)
            self._pieces.append(piece)
            self._nbytes += nbytes
            if self._nbytes >= (PIECE if len(self._others) == self._threads - 1 else FIRST):
                self._flush()
                left = read.file.left()
                if left is not None:
                    self._queue.put(left)

    def _flush(self) -> None:
        import torch

        if self._into:
            self._queue.put(partial(torch._foreach_copy_, self._into, self._pieces))
        self._into, self._pieces, self._nbytes = [], [], 0
        if self._pool is not None and len(self._others) < self._threads - 1:
            self._others.append(self._pool.submit(self._drain))

    def finish(self) -> None:
        """Do what is left; the first error ends all reads."""
        import torch

        self._flush()
        for _ in range(len(self._others) + 1):
            self._queue.put(None)
        torch.set_num_threads(1)
        self._drain()
        for other in self._others:
            other.result()

    def _drain(self) -> None:
        import torch

        try:
            with torch.inference_mode():  # there, also what was made in it may be written
                while (work := self._queue.get()) is not None:
                    if self._failed:
                        return
                    work()
        except BaseException:
            self._failed = True
            raise


def _unmap(mapped: ctypes.Array[ctypes.c_uint8], start: int, stop: int) -> None:
    """Take whole pages out of a mapping, until they are touched; a locked mapping keeps them."""
    address = ctypes.c_void_p(ctypes.addressof(mapped) + start)
    _madvise(address, ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)  # mmap's own would hold up the other threads


def _unwarned(mapped: mmap.mmap) -> ctypes.Array[ctypes.c_uint8]:
    """Return a mapping's bytes as torch takes them without a warning that they cannot be written; nobody does."""
    import numpy

    view = numpy.frombuffer(mapped, numpy.uint8)
    memory = (ctypes.c_uint8 * view.nbytes).from_address(view.ctypes.data)
    memory.view = view  # type: ignore[attr-defined]  # whoever holds the bytes holds the mapping
    return memory
