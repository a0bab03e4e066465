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

from port_kit.errors import RemapError
from port_kit.manifest import Manifest, stamp
from port_kit.regions import Region, full_region, region_index, to_intervals

if TYPE_CHECKING:
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
        self._mapped: dict[tuple[int, int], Tensor] = {}
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _unreadable(path, "opened", error, "check the permissions of the file") from error
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

    def _map(self, itemsize: int, phase: int) -> Tensor:
        """Return the mapped file as integers, starting at a byte below their size."""
        import numpy
        import torch

        count = (len(self._mapping) - phase) // itemsize
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot be written; nobody writes it
            return torch.from_numpy(numpy.frombuffer(self._mapping, f"i{itemsize}", count, phase))

    def tensor(self, name: str) -> Tensor:
        """Return a tensor whose pages are read when they are touched."""
        import torch

        spec, place = self._source[name], self._source.places[name]
        dtype: torch.dtype = getattr(torch, spec.dtype)
        size = min(dtype.itemsize, 8)
        at, phase = divmod(place, size)  # tensors of small elements may leave others at odd addresses
        if (size, phase) not in self._mapped:
            self._mapped[size, phase] = self._map(size, phase)
        elements = self._mapped[size, phase][at : at + spec.nbytes // size]
        return (elements.view(-1, 2) if dtype.itemsize > 8 else elements).view(dtype).view(spec.shape)

    def reads(self, name: str, region: Region, into: Tensor, *, mapped: bool = True) -> Iterator[Callable[[], object]]:
        """Yield the reads of a region into memory of its shape and dtype, about :data:`BLOCK` bytes each.

        Args:
            mapped: copy from the mapping, as is faster if the file is in the page cache; else read contiguous regions,
                as is faster if it is not.
        """
        spec, place = self._source[name], self._source.places[name]
        if not into.numel():
            return
        runs = [] if mapped or not into.is_contiguous() else to_intervals(region, spec.shape)
        if len(runs) == 1:
            start = place + runs[0][0] * into.element_size()
            for at in range(0, into.nbytes, BLOCK):
                size = min(BLOCK, into.nbytes - at)
                memory = (ctypes.c_char * size).from_address(into.data_ptr() + at)
                yield partial(self._read, memoryview(memory).cast("B"), start + at)
            return
        tensor = self.tensor(name)
        piece = tensor if region == full_region(spec.shape) else tensor[region_index(region)]
        if into.nbytes <= BLOCK:
            yield partial(self._copy, into, piece, place + spec.nbytes)
            return
        rows = max(1, len(into) * BLOCK // into.nbytes)
        for at in range(0, len(into), rows):
            yield partial(self._copy, into[at : at + rows], piece[at : at + rows], place + spec.nbytes)

    def _copy(self, into: Tensor, piece: Tensor, stop: int) -> None:
        if os.fstat(self.descriptor).st_size < stop:  # a page that is not there would end the process
            raise self._truncated(stop)
        into.copy_(piece)

    def _truncated(self, stop: int) -> RemapError:
        return RemapError(
            f"{self.path} was truncated: expected at least {stop:,} bytes",
            code="checkpoint_corrupt",
            hint="download it again",
        )

    def _read(self, memory: memoryview, start: int) -> None:
        at = start
        try:
            # Ask for the whole block at once: the system's own read-ahead asks for a few pages at a time.
            os.posix_fadvise(self.descriptor, start, len(memory), os.POSIX_FADV_WILLNEED)
            while len(memory):
                got = os.preadv(self.descriptor, [memory], at)
                if not got:
                    raise self._truncated(at + len(memory))
                memory, at = memory[got:], at + got
        except OSError as error:
            hint = "check the disk, or the network that the file is on"
            raise _unreadable(self.path, f"read at byte {at:,}", error, hint) from error


def _unreadable(path: Path, what: str, error: OSError, hint: str) -> RemapError:
    return RemapError(f"{path} cannot be {what}: {error.strerror}", code="checkpoint_unreadable", hint=hint)
