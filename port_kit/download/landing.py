"""One file on its way in: what is hashed, checked and rearranged before it gets its name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from port_kit.download.blueprint import Blueprint, DescriptorSource, check_crcs
from port_kit.download.files import begin_writing_out, hashes_for
from port_kit.download.http import Interrupted
from port_kit.download.layout import read_exactly
from port_kit.download.parts import Part
from port_kit.pickles import read_tables

_PIECE = 1 << 20
_WRITTEN_OUT = 32 << 20  # bytes between two calls to the disk


class Damaged(Exception):
    """The bytes that landed are not the file's: worth one more try from the beginning. Never leaves this package."""


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
        self.failure: BaseException | None = None
        self._landed = threading.Event()
        self._users = 0
        self._idle = threading.Condition()
        self._retired = False

    @contextmanager
    def used(self) -> Iterator[bool]:
        """Hold the part open while segments are written; false where it is wanted no more."""
        with self._idle:
            wanted = not self._retired and self.failure is None
            self._users += wanted
        try:
            yield wanted
        finally:
            with self._idle:
                self._users -= wanted
                self._idle.notify_all()
            self._landed.set()

    def retire(self) -> None:
        """Wait until nobody writes any more; the part can be closed then."""
        with self._idle:
            self._retired = True
            self._idle.wait_for(lambda: self._users == 0)

    def write(self, offset: int, data: bytes | memoryview) -> int:
        """Write bytes that came; return how many of them were new."""
        count = self.part.write(offset, data)
        self._landed.set()
        return count

    def check_source(self, stopped: Callable[[], bool]) -> str:
        """Hash what lands, in order, until everything has; return the sha256.

        Raises:
            Damaged: the content is not what the repository states.
        """
        kind, _, stated = self.identity.digest.partition(":")
        hashes = hashes_for(self.identity.size, git=kind == "git")
        buffer, position = memoryview(bytearray(_PIECE)), 0
        while position < self.identity.size:
            view = buffer[: min(_PIECE, self._wait_behind(position, stopped) - position)]
            try:
                self.part.layout.read_into(self.part.descriptor, position, view)
            except OSError as error:
                raise Damaged(str(error)) from error
            for item in hashes.values():
                item.update(view)
            position += len(view)
            if position % _WRITTEN_OUT < len(view):
                begin_writing_out(self.part.descriptor)
        found = hashes[kind].hexdigest()
        if found != stated:
            raise Damaged(f"its {kind} hash is {found}, the repository states {stated}")
        return hashes["sha256"].hexdigest()

    def _wait_behind(self, position: int, stopped: Callable[[], bool]) -> int:
        """Return how far all bytes have landed, once that is behind ``position``."""
        while True:
            self._landed.clear()
            frontier = self.part.frontier
            if frontier > position:
                return frontier
            if self.failure is not None:
                raise self.failure
            if stopped():
                raise Interrupted
            self._landed.wait(0.5)

    def seal(self, source_sha256: str) -> None:
        """Turn the landed bytes into the final file and make it durable."""
        if self.blueprint is None:
            self.part.seal(self.identity.size, source_sha256)
            return
        self._convert(self.blueprint)
        self.part.seal(self.blueprint.size, sha256_of(self.part.descriptor, self.blueprint.size))

    def _convert(self, blueprint: Blueprint) -> None:
        """The source's hash is right by now: read its tables again, from the bytes that were hashed."""
        name = f"{self.identity.repo_id}/{self.identity.path}"
        source = DescriptorSource(self.part.descriptor, self.part.layout, name)
        if read_tables(source, self.identity.wrapper) != blueprint.tables:
            raise Damaged("its directory was read differently before")
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
        buffer = memoryview(bytearray(_PIECE))
        while start < end:
            view = buffer[: min(_PIECE, end - start)]
            read_exactly(descriptor, view, start)
            advance(landing.write(start, view))
            start += len(view)
    finally:
        os.close(descriptor)
