"""A file that is being downloaded.

The content invariant: a file under its final name has exactly the bytes that were hashed, and no writer can
change it afterwards.

* Every byte is written once. :meth:`IncomingFile.write` is the only writer; it appends to a segment under the segment's
  lock, clips bytes that the segment already has or does not contain, and never rewrites a byte.
* Every byte is hashed once, in the source's order: out of the buffer that it was received into, or read back from disk
  (bytes out of order, bytes of an earlier run). Counts and notes of an earlier run are not believed.
* The hash ends when all segments are complete. Then :meth:`IncomingFile.close_when_idle` waits until no connection
  holds the file, and only then it is converted, published by rename, or discarded.

Bytes of a converted checkpoint are written to their offsets in the safetensors file; see
:mod:`port_kit.checkpoint.byte_layout`.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from port_kit.checkpoint.byte_layout import DescriptorSource, read_exactly
from port_kit.checkpoint.byte_sources import FileSource
from port_kit.download.http import Interrupted
from port_kit.download.parts import ALIGNMENT, PartialDownload, Segment
from port_kit.escape import reason_of
from port_kit.files import begin_writing_out, hashes_for

if TYPE_CHECKING:
    from port_kit.checkpoint.safetensors_writer import SafetensorsLayout
    from port_kit.download.http import Response

BUFFER_SIZE = 1 << 20
_WRITTEN_OUT = 32 << 20  # bytes between two calls to the disk
_AHEAD = 4  # buffers that wait for the hash before the connection does
_GRACE = 1.0  # seconds in which a connection may end by itself


class Damaged(Exception):
    """The bytes that arrived are not the file's: worth one more try from the beginning. Never leaves this package."""


class Misplaced(Damaged):
    """A checkpoint's storages have other offsets than its layout assumed."""


class Buffer:
    """A buffer that begins at a page. Connections and the hash share a few; see :meth:`IncomingFile.take_buffer`."""

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, BUFFER_SIZE))
        self.content = self.memory[:0]
        self.users = 1


class IncomingFile:
    """A download in progress, shared by its hashing thread and the connections; see the module's text.

    Args:
        partial: destination of its bytes.
        conversion: the safetensors file that it becomes, if it is converted on the way.
        local: a file on this machine that may hold its bytes already; None for the network.
        advance: called with the number of bytes of each write.
    """

    def __init__(
        self,
        partial: PartialDownload,
        conversion: SafetensorsLayout | None,
        local: Path | None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.partial, self.conversion, self.local, self._advance = partial, conversion, local, advance
        self.spec = partial.spec
        if conversion is not None:
            partial.layout = conversion.byte_layout()
        self.location: str | None = None  # target of the last redirect
        self.whole = threading.Lock()  # held by the one connection that receives the complete file
        self.failure: BaseException | None = None
        self._changed = threading.Condition()
        self._responses: list[Response | None] = []
        self._closing = False
        self._free: list[Buffer] = []
        self._handed: deque[Buffer] = deque()
        self._read_buffer: memoryview | None = None
        self._promised = 0  # all bytes before this one are hashed, or will be, out of buffers that were handed over

    @contextmanager
    def in_use(self, response: Response | None = None) -> Iterator[bool]:
        """Keep the file open while a connection writes to it; yields False if it is not wanted any more."""
        with self._changed:
            wanted = not self._closing and self.failure is None
            if wanted:
                self._responses.append(response)
        try:
            yield wanted
        finally:
            if wanted:
                with self._changed:
                    self._responses.remove(response)
                    self._changed.notify_all()

    def close_when_idle(self) -> None:
        """Wait until no connection uses the file. One that a server keeps waiting is broken off."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while not self._changed.wait_for(lambda: not self._responses, _GRACE):
                for response in self._responses:
                    if response is not None:
                        response.abort()

    def take_buffer(self) -> Buffer:
        """Return a buffer to receive into, once the hash is not too far behind; :meth:`write` takes it back.

        Raises:
            Interrupted: the file is not wanted any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._handed) < _AHEAD or self._closing or self.failure is not None)
            if self._closing or self.failure is not None:
                raise Interrupted
            buffer = self._free.pop() if self._free else Buffer()
            buffer.users = 1
            return buffer

    def write(self, segment: Segment, offset: int, buffer: Buffer, begin: int, count: int) -> None:
        """Write the bytes that a segment lacks, of the source's bytes from ``offset``, which is in the segment.

        The ``count`` bytes lie at ``begin`` of the buffer, which is free again once the hash does not need it.
        """
        try:
            with segment.lock:
                known = segment.position - offset
                lacking = min(count, segment.end - offset)
                if not 0 <= known < lacking:
                    return
                buffer.content = buffer.memory[begin + known : begin + lacking]
                handed = self._hand_over(offset + known, buffer)
                aligned = handed and (begin + known) % ALIGNMENT == 0
                self.partial.append(segment, buffer.content, unbuffered=aligned)
            self._advance(lacking - known)
        finally:
            self._give_back(buffer)

    def _hand_over(self, offset: int, buffer: Buffer) -> bool:
        """Give the hash a buffer if it is the next one in the source's order and needs no rearranging."""
        with self._changed:
            if offset != self._promised or not self.partial.layout.is_identity:
                return False
            self._promised += len(buffer.content)
            buffer.users += 1
            self._handed.append(buffer)
            self._changed.notify_all()
            return True

    def _give_back(self, buffer: Buffer) -> None:
        """Count one user less; the last one makes the buffer free."""
        with self._changed:
            buffer.users -= 1
            if not buffer.users:
                self._free.append(buffer)
            self._changed.notify_all()

    def hash_source(self, stopped: Callable[[], bool]) -> str:
        """Hash the source while it arrives, until it is complete and no connection uses it; return the sha256.

        Raises:
            Damaged: the content differs from the repository's hash.
        """
        kind, _, stated = self.spec.digest.partition(":")
        hashes = hashes_for(self.spec.size, git=kind == "git")
        for view in self._in_order(stopped):
            for item in hashes.values():
                item.update(view)
        self.close_when_idle()
        found = hashes[kind].hexdigest()
        if found != stated:
            raise Damaged(f"its {kind} hash is {found}, the repository states {stated}")
        return hashes["sha256"].hexdigest()

    def _in_order(self, stopped: Callable[[], bool]) -> Iterator[memoryview]:
        """Yield all bytes of the source as they arrive; ends when the last one has been written."""
        position = 0
        while position < self.spec.size or self.partial.contiguous_bytes < self.spec.size:
            found = self._next(position, stopped)
            if isinstance(found, Buffer):
                yield found.content
                position += len(found.content)
                self._give_back(found)
            else:
                yield self._from_disk(position, found)
                position += found

    def _next(self, position: int, stopped: Callable[[], bool]) -> Buffer | int:
        """Wait for the bytes from ``position``: a buffer, or how many to read back (0 if only the end was awaited)."""
        with self._changed:
            while True:
                if self._handed:
                    return self._handed.popleft()
                ready = self.partial.contiguous_bytes - position
                if ready > 0 and self._promised == position:
                    self._promised += min(ready, BUFFER_SIZE)
                    return min(ready, BUFFER_SIZE)
                if position == self.spec.size and not ready:
                    return 0
                if self.failure is not None:
                    raise self.failure
                if stopped():
                    raise Interrupted
                self._changed.wait(0.5)

    def _from_disk(self, position: int, count: int) -> memoryview:
        """Read back written bytes, at most one buffer."""
        if self._read_buffer is None:
            self._read_buffer = memoryview(bytearray(BUFFER_SIZE))
        view = self._read_buffer[:count]
        try:
            self.partial.layout.read_into(self.partial.descriptor, position, view)
        except OSError as error:
            raise Damaged(reason_of(error)) from error
        if (position + count) % _WRITTEN_OUT < count:
            begin_writing_out(self.partial.descriptor)
        return view

    def finalize(self, source_sha256: str) -> tuple[int, str]:
        """Convert the hashed bytes if that is wanted; return size and sha256 of the final file."""
        if self.conversion is None:
            return self.spec.size, source_sha256
        self._convert(self.conversion)
        return self.conversion.size, sha256_of(self.partial.descriptor, self.conversion.size)

    def _convert(self, conversion: SafetensorsLayout) -> None:
        """Read the checkpoint's tables again, now from the bytes that were hashed, and complete the new file."""
        from port_kit.checkpoint.pickle_reader import read_tables
        from port_kit.checkpoint.safetensors_writer import check_crcs

        name = f"{self.spec.repo_id}/{self.spec.path}"
        source = DescriptorSource(self.partial.descriptor, self.partial.layout, name)
        if read_tables(source, self.spec.wrapper, drop=self.spec.drop) != conversion.tables:
            raise Misplaced("its directory was read differently before")
        check_crcs(conversion, name, source.read_into)
        conversion.complete(source, self.partial.descriptor)


def sha256_of(descriptor: int, size: int) -> str:
    """Return the sha256 of a file's first ``size`` bytes."""
    item = hashes_for(size, git=False)["sha256"]
    buffer = memoryview(bytearray(BUFFER_SIZE))
    for offset in range(0, size, BUFFER_SIZE):
        view = buffer[: min(BUFFER_SIZE, size - offset)]
        read_exactly(descriptor, view, offset)
        item.update(view)
    return item.hexdigest()


def copy_segment(incoming: IncomingFile, local: Path, segment: Segment) -> None:
    """Copy the missing bytes of a segment from a file on this machine.

    Raises:
        Damaged: the file cannot be read, or not to the segment's end.
    """
    try:
        with FileSource(local) as source:
            while not segment.is_complete:
                buffer, offset = incoming.take_buffer(), segment.position
                count = min(BUFFER_SIZE, segment.end - offset)
                read_exactly(source.descriptor, buffer.memory[:count], offset)
                incoming.write(segment, offset, buffer, 0, count)
    except OSError as error:
        raise Damaged(f"{local} cannot be read: {error.strerror or error}") from error
