"""Reading of regions of tensors from a safetensors file, straight into memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.errors import RemapError
from port_kit.manifest import Manifest, stamp
from port_kit.regions import Region, region_index, to_intervals

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

    def tensor(self, name: str) -> Tensor:
        """Return a tensor whose pages are read when they are touched."""
        import numpy
        import torch

        spec = self._source[name]
        dtype = getattr(torch, spec.dtype)
        if not spec.numel:
            return torch.empty(spec.shape, dtype=dtype)
        bits: Any = numpy.dtype(f"u{dtype.itemsize}" if dtype.itemsize <= 8 else "c16")
        view = numpy.frombuffer(self._mapping, bits, spec.numel, self._source.places[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot be written; nobody writes it
            return torch.from_numpy(view).view(dtype).view(spec.shape)

    def reads(self, name: str, region: Region, into: Tensor) -> Iterator[Callable[[], object]]:
        """Yield the reads of a region into memory of its shape and dtype, about :data:`BLOCK` bytes each."""
        spec = self._source[name]
        runs = to_intervals(region, spec.shape) if into.is_contiguous() and into.numel() else []
        if len(runs) == 1:
            start = self._source.places[name] + runs[0][0] * into.element_size()
            for at in range(0, into.nbytes, BLOCK):
                size = min(BLOCK, into.nbytes - at)
                memory = (ctypes.c_char * size).from_address(into.data_ptr() + at)
                yield partial(self._read, memoryview(memory).cast("B"), start + at)
        elif into.numel():
            piece = self.tensor(name)[region_index(region)]
            rows = max(1, len(into) * BLOCK // into.nbytes)
            for at in range(0, len(into), rows):
                yield partial(into[at : at + rows].copy_, piece[at : at + rows])

    def _read(self, memory: memoryview, start: int) -> None:
        at = start
        try:
            # Ask for the whole block at once: the system's own read-ahead asks for a few pages at a time.
            os.posix_fadvise(self.descriptor, start, len(memory), os.POSIX_FADV_WILLNEED)
            while len(memory):
                got = os.preadv(self.descriptor, [memory], at)
                if not got:
                    raise RemapError(
                        f"{self.path} ends at byte {at:,}: expected {len(memory):,} bytes more",
                        code="checkpoint_corrupt",
                        hint="the file was truncated; download it again",
                    )
                memory, at = memory[got:], at + got
        except OSError as error:
            hint = "check the disk, or the network that the file is on"
            raise _unreadable(self.path, f"read at byte {at:,}", error, hint) from error


def _unreadable(path: Path, what: str, error: OSError, hint: str) -> RemapError:
    return RemapError(f"{path} cannot be {what}: {error.strerror}", code="checkpoint_unreadable", hint=hint)
