"""Reading of regions of tensors from a safetensors file, straight into memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from port_kit.checkpoint.byte_layout import Truncated, read_exactly
from port_kit.errors import RemapError
from port_kit.manifest import Manifest, stamp
from port_kit.regions import Region, region_index, to_intervals

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Bytes of one read.
BLOCK = 16 << 20


class SafetensorsFile:
    """An open safetensors file, its tensors as views of a read-only mapping.

    Raises:
        RemapError: ``checkpoint_unreadable``; ``manifest_invalid`` if it is not the file whose header was read.
    """

    def __init__(self, path: Path, file: str, source: Manifest) -> None:
        self.path, self._source = path, source
        self._mapped: dict[tuple[torch.dtype, int], Tensor] = {}
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _unreadable(path, "opened", error, "check the permissions of the file") from error
        self._size = source.stamps[file][2]
        if stamp(self.descriptor) != source.stamps[file]:
            self.close()
            raise RemapError(
                f"{path} was changed or replaced after its header was read",
                code="manifest_invalid",
                hint="load it when no other process writes to it",
            )

    def close(self) -> None:
        """Close the descriptor; the mapping ends with the last view of it."""
        os.close(self.descriptor)

    @cached_property
    def _mapping(self) -> mmap.mmap:
        return mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ)

    def _map(self, dtype: torch.dtype, phase: int) -> Tensor:
        """Return the mapped file as elements of a dtype, starting at a byte below their size."""
        import numpy
        import torch

        size = min(dtype.itemsize, 8)
        count = (len(self._mapping) - phase) // dtype.itemsize * (dtype.itemsize // size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning that the buffer is read-only; it is not written
            return torch.from_numpy(numpy.frombuffer(self._mapping, f"i{size}", count, phase)).view(dtype)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor whose pages are read when they are touched."""
        import torch

        spec, place = self._source[name], self._source.places[name]
        dtype: torch.dtype = getattr(torch, spec.dtype)
        at, phase = divmod(place, dtype.itemsize)  # tensors of small elements may leave others at odd addresses
        if (dtype, phase) not in self._mapped:
            self._mapped[dtype, phase] = self._map(dtype, phase)
        return self._mapped[dtype, phase][at : at + spec.numel].view(spec.shape)

    def check_size(self) -> None:
        """Raise ``checkpoint_corrupt`` if the file was truncated: a page that is not there would end the process."""
        if os.fstat(self.descriptor).st_size < self._size:
            raise self._truncated(self._size)

    def unmap(self, start: int, stop: int) -> None:
        """Take the pages of a span of the file out of the mapping, until they are touched again.

        At the end of the mapping, one thread would need as long for it as a quarter of all copies.
        """
        first = self._address + start // mmap.PAGESIZE * mmap.PAGESIZE
        # mmap's own method would keep the interpreter from the other threads
        length = ctypes.c_size_t(self._address + stop - first)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), length, mmap.MADV_DONTNEED)

    @cached_property
    def _address(self) -> int:
        import numpy

        return int(numpy.frombuffer(self._mapping, "u1").ctypes.data)

    def pieces(self, name: str, region: Region, into: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield parts of memory and the mapped elements to be copied there, about :data:`BLOCK` bytes each.

        This is the fastest way if the file is in the page cache. Call :meth:`check_size` before the pages are touched.

        Args:
            region: the region of the tensor.
            into: memory of the region's shape and dtype.
        """
        tensor = self.tensor(name)
        piece = tensor if tensor.shape == into.shape else tensor[region_index(region)]
        if into.nbytes <= BLOCK:
            yield into, piece
            return
        rows = max(1, len(into) * BLOCK // into.nbytes)
        for at in range(0, len(into), rows):
            yield into[at : at + rows], piece[at : at + rows]

    def reads(self, name: str, region: Region, into: Tensor) -> Iterator[Callable[[], object]]:
        """Yield the reads of a region into memory of its shape and dtype, about :data:`BLOCK` bytes each.

        Between contiguous regions and memory they go without the mapping: faster if the file is not in the page cache.
        """
        spec, place = self._source[name], self._source.places[name]
        runs = to_intervals(region, spec.shape) if into.numel() and into.is_contiguous() else []
        if len(runs) != 1:
            for part, piece in self.pieces(name, region, into):
                yield partial(self._copy, part, piece)
            return
        start = place + runs[0][0] * into.element_size()
        for at in range(0, into.nbytes, BLOCK):
            size = min(BLOCK, into.nbytes - at)
            memory = (ctypes.c_char * size).from_address(into.data_ptr() + at)
            yield partial(self._read, memoryview(memory).cast("B"), start + at)

    def _copy(self, into: Tensor, piece: Tensor) -> None:
        self.check_size()
        into.copy_(piece)

    def _truncated(self, stop: int) -> RemapError:
        return RemapError(
            f"{self.path} was truncated: expected at least {stop:,} bytes",
            code="checkpoint_corrupt",
            hint="download it again",
        )

    def _read(self, memory: memoryview, start: int) -> None:
        try:
            # Request the complete block at once: the system's own read-ahead requests a few pages at a time.
            os.posix_fadvise(self.descriptor, start, len(memory), os.POSIX_FADV_WILLNEED)
            read_exactly(self.descriptor, memory, start)
        except Truncated as error:
            raise self._truncated(start + len(memory)) from error
        except OSError as error:
            hint = "check the disk, or the network that the file is on"
            raise _unreadable(self.path, f"read at byte {start:,}", error, hint) from error


def _unreadable(path: Path, what: str, error: OSError, hint: str) -> RemapError:
    return RemapError(f"{path} cannot be {what}: {error.strerror}", code="checkpoint_unreadable", hint=hint)
