"""The map from the bytes of a source file to the file that is written while it arrives.

A plain download is written byte by byte. A checkpoint that becomes a safetensors file is rearranged on the way: every
tensor's bytes go to their final place, and all other bytes (zip headers, the pickle) go behind the end. No byte is lost
until the file is published, so that the source's hash can be computed, and a transfer resumed, in both cases alike.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class ByteRange(NamedTuple):
    """``length`` bytes from ``source`` in the source file lie at ``target`` in the written file."""

    source: int
    length: int
    target: int


class ByteLayout:
    """A one-to-one map of the source's bytes; the ranges are ordered and cover ``[0, size)`` without gaps."""

    def __init__(self, ranges: Sequence[ByteRange], size: int) -> None:
        self.size = size
        self._ranges = [item for item in ranges if item.length]
        self._starts = [item.source for item in self._ranges]
        end = 0
        for item in self._ranges:
            if item.source != end or item.length < 0:
                raise ValueError(f"the layout jumps from byte {end} to {item.source}")
            end += item.length
        if end != size:
            raise ValueError(f"the layout ends at byte {end} of {size}")

    @classmethod
    def identity(cls, size: int) -> ByteLayout:
        """Return the layout of a plain download."""
        return cls([ByteRange(0, size, 0)], size)

    @property
    def is_identity(self) -> bool:
        """Return True if every byte stays at its offset."""
        return len(self._ranges) == 1 and self._ranges[0].target == 0

    @property
    def extent(self) -> int:
        """Size of the written file before it is published."""
        return max((item.target + item.length for item in self._ranges), default=0)

    def ranges(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield ``(start within the piece, length, target offset)`` for ``length`` source bytes from ``offset``."""
        index, done = bisect_right(self._starts, offset) - 1, 0
        while done < length:
            item = self._ranges[index]
            skipped = offset + done - item.source
            count = min(length - done, item.length - skipped)
            yield done, count, item.target + skipped
            done += count
            index += 1

    def until_aligned(self, offset: int, block: int) -> int:
        """Return how many source bytes from ``offset`` there are until one is written at a multiple of ``block``."""
        _, _, target = next(self.ranges(offset, 1))
        return block - target % block

    def write(self, descriptor: int, offset: int, data: bytes | memoryview, end: int | None = None) -> None:
        """Write source bytes to their places; leave out those that lie behind ``end`` there."""
        view = memoryview(data)
        for start, length, target in self.ranges(offset, len(view)):
            if end is None or target < end:
                write_all(descriptor, view[start : start + length], target)

    def read_into(self, descriptor: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with source bytes from ``offset``; they must have been written."""
        for start, length, target in self.ranges(offset, len(buffer)):
            read_exactly(descriptor, buffer[start : start + length], target)


class DescriptorSource:
    """A file that is written through a layout, read as if it were the source.

    It is a :class:`~port_kit.checkpoint.byte_sources.ByteSource`.
    """

    def __init__(self, descriptor: int, layout: ByteLayout, name: str) -> None:
        self.descriptor, self._layout = descriptor, layout
        self.name, self.size = name, layout.size

    def read_at(self, offset: int, length: int) -> bytes:
        """See :class:`~port_kit.checkpoint.byte_sources.ByteSource`."""
        pieces = []
        for _, count, target in self._layout.ranges(offset, max(0, min(length, self.size - offset))):
            while count:
                pieces.append(os.pread(self.descriptor, count, target))
                if not pieces[-1]:
                    raise Truncated(f"the file ends before byte {target + count}")
                count, target = count - len(pieces[-1]), target + len(pieces[-1])
        return b"".join(pieces)  # no copy if there is one

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with source bytes from ``offset``."""
        self._layout.read_into(self.descriptor, offset, buffer)


class Truncated(OSError):
    """The end of a file in front of bytes that it should have."""


def write_all(descriptor: int, view: memoryview, offset: int) -> None:
    """``pwrite`` until everything is written."""
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def read_exactly(descriptor: int, view: memoryview, offset: int) -> None:
    """``preadv`` until the view is full; raises :class:`Truncated` if the file ends before that."""
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise Truncated(f"the file ends before byte {offset + len(view)}")
        view, offset = view[count:], offset + count
