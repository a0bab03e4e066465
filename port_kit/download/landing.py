"""One file on its way in: what is hashed, checked and rearranged before it gets its name.

Bytes that arrive in the file's order are hashed out of the buffer that they were received into, while that is written;
what arrives ahead of the order (several segments at a time, an earlier run's part) is read back when its turn comes.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from port_kit.download.files import begin_writing_out, hashes_for
from port_kit.download.http import Interrupted
from port_kit.download.layout import read_exactly
from port_kit.download.parts import Part

if TYPE_CHECKING:
    from port_kit.download.blueprint import Blueprint

_PIECE = 1 << 20
_WRITTEN_OUT = 32 << 20  # bytes between two calls to the disk
_AHEAD = 4  # pieces that wait for the hash before the connection does


class Damaged(Exception):
    """The bytes that landed are not the file's: worth one more try from the beginning. Never leaves this package."""


class Misplaced(Damaged):
    """A checkpoint's storages do not lie where they were thought to when its bytes were placed."""


class Piece:
    """A buffer that begins at a page. It goes round between the connections and the hash; see :meth:`Landing.take`."""

    def __init__(self) -> None:
        self.buffer = memoryview(mmap.mmap(-1, _PIECE))
        self.content = self.buffer[:0]
        self.users = 1


class Landing:
    """A file in work, shared by the thread that owns it and the connections that bring its segments.

    Args:
        part: where its bytes land.
        blueprint: what it becomes, where it is converted on the way.
        local: a file on this machine that may hold its bytes already; None for the network.
    """

    def __init__(self, part: Part, blueprint: Blueprint | None, local: Path | None) -> None:
        self.part, self.blueprint, self.local = part, blueprint, local
        self.identity = part.identity
        if blueprint is not None:
            part.layout = blueprint.layout()
        self.location: str | None = None
        self.whole = threading.Lock()
        self.rewritten = False  # bytes that were hashed may have been written once more since then
        self.failure: BaseException | None = None
        self._changed = threading.Condition()
        self._users = 0
        self._retired = False
        self._free: list[Piece] = []
        self._handed: deque[Piece] = deque()
        self._buffer: memoryview | None = None
        self._promised = 0  # all bytes before this one are hashed, or will be, out of pieces that were handed over

    @contextmanager
    def used(self) -> Iterator[bool]:
        """Hold the part open while segments are written; false where it is wanted no more."""
        with self._changed:
            wanted = not self._retired and self.failure is None
            self._users += wanted
        try:
            yield wanted
        finally:
            with self._changed:
                self._users -= wanted
                self._changed.notify_all()

    def retire(self) -> None:
        """Wait until nobody writes any more; the part can be closed then."""
        with self._changed:
            self._retired = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._users == 0)

    def take(self) -> Piece:
        """Return a buffer to receive into, once the hash is not too far behind; it goes back with :meth:`write`.

        Raises:
            Interrupted: the file is wanted no more.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._handed) < _AHEAD or self._retired or self.failure is not None)
            if self._retired or self.failure is not None:
                raise Interrupted
            piece = self._free.pop() if self._free else Piece()
            piece.users = 1
            return piece

    def write(self, offset: int, piece: Piece, begin: int, count: int) -> int:
        """Write the ``count`` bytes that came, from ``begin`` in the buffer; return how many of them were new."""
        piece.content = piece.buffer[begin : begin + count]
        handed = self._hand_over(offset, piece)
        try:
            return self.part.write(offset, piece.content, unbuffered=handed and begin == 0)
        finally:
            self._give(piece)

    def _hand_over(self, offset: int, piece: Piece) -> bool:
        """Let the hash have a piece, where it is the next one in the file's order and needs no rearranging."""
        with self._changed:
            if offset != self._promised or not self.part.layout.is_identity or not piece.content:
                return False
            self._promised += len(piece.content)
            piece.users += 1
            self._handed.append(piece)
            self._changed.notify_all()
            return True

    def _give(self, piece: Piece) -> None:
        """One user fewer; the last one makes the buffer free."""
        with self._changed:
            piece.users -= 1
            if not piece.users:
                self._free.append(piece)
            self._changed.notify_all()

    def check_source(self, stopped: Callable[[], bool]) -> str:
        """Hash what lands, in order, until everything has; return the sha256.

        Raises:
            Damaged: the content is not what the repository states.
        """
        kind, _, stated = self.identity.digest.partition(":")
        hashes = hashes_for(self.identity.size, git=kind == "git")
        for view in self._in_order(stopped):
            for item in hashes.values():
                item.update(view)
        if self.rewritten:
            hashes = hashes_for(self.identity.size, git=kind == "git")
            for view in self._from_disk(0, self.identity.size):
                for item in hashes.values():
                    item.update(view)
        found = hashes[kind].hexdigest()
        if found != stated:
            raise Damaged(f"its {kind} hash is {found}, the repository states {stated}")
        return hashes["sha256"].hexdigest()

    def _in_order(self, stopped: Callable[[], bool]) -> Iterator[memoryview]:
        """Yield all bytes of the source as they land; ends when the last one has been written."""
        position = 0
        while position < self.identity.size or self.part.frontier < self.identity.size:
            found = self._next(position, stopped)
            if isinstance(found, Piece):
                yield found.content
                position += len(found.content)
                self._give(found)
            else:
                yield from self._from_disk(position, position + found)
                position += found

    def _next(self, position: int, stopped: Callable[[], bool]) -> Piece | int:
        """Wait for the bytes from ``position``: a piece, or how many to read back; 0 where only the end was awaited."""
        with self._changed:
            while True:
                if self._handed:
                    return self._handed.popleft()
                ready = self.part.frontier - position
                if ready > 0 and self._promised == position:
                    self._promised += min(ready, _PIECE)
                    return min(ready, _PIECE)
                if position == self.identity.size and not ready:
                    return 0
                if self.failure is not None:
                    raise self.failure
                if stopped():
                    raise Interrupted
                self._changed.wait(0.5)

    def _from_disk(self, start: int, end: int) -> Iterator[memoryview]:
        """Read back what has been written."""
        if self._buffer is None:
            self._buffer = memoryview(bytearray(_PIECE))
        for position in range(start, end, _PIECE):
            view = self._buffer[: min(_PIECE, end - position)]
            try:
                self.part.layout.read_into(self.part.descriptor, position, view)
            except OSError as error:
                raise Damaged(str(error)) from error
            yield view
            if (position + len(view)) % _WRITTEN_OUT < len(view):
                begin_writing_out(self.part.descriptor)

    def seal(self, source_sha256: str) -> None:
        """Turn the landed bytes into the final file and make it durable."""
        if self.blueprint is None:
            self.part.seal(self.identity.size, source_sha256)
            return
        self._convert(self.blueprint)
        self.part.seal(self.blueprint.size, sha256_of(self.part.descriptor, self.blueprint.size))

    def _convert(self, blueprint: Blueprint) -> None:
        """The source's hash is right by now: read its tables again, from the bytes that were hashed."""
        from port_kit.checkpoint.pickle_reader import read_tables
        from port_kit.download.blueprint import DescriptorSource, check_crcs

        name = f"{self.identity.repo_id}/{self.identity.path}"
        source = DescriptorSource(self.part.descriptor, self.part.layout, name)
        if read_tables(source, self.identity.wrapper) != blueprint.tables:
            raise Misplaced("its directory was read differently before")
        check_crcs(blueprint, name, source.read_into)
        blueprint.complete(source, self.part.descriptor)


def sha256_of(descriptor: int, size: int) -> str:
    """Return the sha256 of a file's first ``size`` bytes."""
    item = hashes_for(size, git=False)["sha256"]
    buffer = memoryview(bytearray(_PIECE))
    for offset in range(0, size, _PIECE):
        view = buffer[: min(_PIECE, size - offset)]
        read_exactly(descriptor, view, offset)
        item.update(view)
    return item.hexdigest()


def copy_segments(landing: Landing, local: Path, start: int, end: int, advance: Callable[[int], None]) -> None:
    """Bring a range from a file on this machine."""
    descriptor = os.open(local, os.O_RDONLY)
    try:
        while start < end:
            piece, count = landing.take(), min(_PIECE, end - start)
            read_exactly(descriptor, piece.buffer[:count], start)
            advance(landing.write(start, piece, 0, count))
            start += count
    finally:
        os.close(descriptor)
