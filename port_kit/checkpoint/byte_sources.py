"""Sources of bytes by offset: a file on disk, on the Hub, or in an incomplete download."""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from port_kit.checkpoint.byte_layout import ByteLayout, DescriptorSource

_BLOCK = 1 << 16
_CACHED_BLOCKS = 256
_MOST_AT_ONCE = 1 << 28


@runtime_checkable
class ByteSource(Protocol):
    """Bytes that can be read by offset.

    Attributes:
        name: name for messages.
        size: how many bytes it has.
    """

    name: str
    size: int

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``, fewer only at the end of the source."""


class FileSource(DescriptorSource, AbstractContextManager["FileSource"]):
    """A local file as a :class:`ByteSource`; use it as a context manager."""

    def __init__(self, path: str | Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        super().__init__(descriptor, ByteLayout.identity(os.fstat(descriptor).st_size), str(path))

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


class StreamSource:
    """An open, seekable binary file as a :class:`ByteSource`; its owner closes it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.name = str(getattr(stream, "name", "stream"))
        self._stream = stream
        self.size = stream.seek(0, os.SEEK_END)

    def read_at(self, offset: int, length: int) -> bytes:
        """See :class:`ByteSource`."""
        self._stream.seek(offset)
        return self._stream.read(length)


class CachedSource:
    """A :class:`ByteSource` behind cached blocks, to spare requests; it has a read-only file's methods, too."""

    def __init__(self, source: ByteSource) -> None:
        self.name, self.size = source.name, source.size
        self._source = source
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def read_at(self, offset: int, length: int) -> bytes:
        """See :class:`ByteSource`."""
        self.seek(offset)
        return self.read(length)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset} in {self.name}")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self.size - self._position)
        size = rest if size < 0 else min(size, rest)
        if size == 0:
            return b""
        if size > _MOST_AT_ONCE:  # directories and pickles are read this way, and are smaller
            raise ValueError(f"{size} bytes at once from {self.name}")
        first, last = self._position // _BLOCK, (self._position + size - 1) // _BLOCK
        if last - first >= _CACHED_BLOCKS:
            data = self._source.read_at(self._position, size)
        else:
            self._load(first, last)
            start = self._position - first * _BLOCK
            data = b"".join(self._blocks[index] for index in range(first, last + 1))[start : start + size]
        self._position += len(data)
        return data

    def readline(self) -> bytes:
        """Read up to a newline; looks no further than one block, which is enough for text opcodes of pickles."""
        start = self._position
        before, newline, _ = self.read(_BLOCK).partition(b"\n")
        self._position = start + len(before + newline)
        return before + newline

    def _load(self, first: int, last: int) -> None:
        """Read the missing blocks of a range with one request, and forget the oldest ones."""
        missing = [index for index in range(first, last + 1) if index not in self._blocks]
        if missing:
            start = missing[0] * _BLOCK
            data = self._source.read_at(start, (missing[-1] + 1) * _BLOCK - start)
            for index in range(missing[0], missing[-1] + 1):
                self._blocks[index] = data[(index - missing[0]) * _BLOCK : (index - missing[0] + 1) * _BLOCK]
        for index in range(first, last + 1):
            self._blocks.move_to_end(index)
        while len(self._blocks) > 2 * _CACHED_BLOCKS:
            self._blocks.popitem(last=False)
