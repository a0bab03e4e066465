"""A file on its way: its bytes, how far they have come, and what they are to become.

``.port_kit/parts/<key>.<owner>/`` holds ``data``, ``progress`` (one count a segment, written after the bytes that it
counts) and ``meta.json`` (identity, ETag, segment size; after sealing also the final size and hash). A part belongs to
one process; the next one takes it over by renaming the folder, which only one can do, after its owner has died.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from port_kit.download.files import STATE_FOLDER, explained, publish, read_json, sync_folder, write_json
from port_kit.download.layout import Layout, write_all

_COUNT = struct.Struct("<Q")
#: what unbuffered writes need of offset, length and address: the memory page, and no disk's sectors are larger
ALIGNMENT = 4096


@dataclass(frozen=True)
class Identity:
    """What a part is made of; a part with another identity is worthless.

    Attributes:
        target: path in the model directory.
        repo_id, commit, path: where the source lies.
        size: of the source, bytes.
        digest: of the source, ``sha256:...`` or ``git:...``.
        convert, wrapper: see :class:`~port_kit.download.recipe.FileRule`.
    """

    target: str
    repo_id: str
    commit: str
    path: str
    size: int
    digest: str
    convert: bool = False
    wrapper: str = ""


@dataclass
class Segment:
    """A range of the source; bytes ``[start, position)`` have been written."""

    index: int
    start: int
    end: int
    position: int

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing."""
        return self.position >= self.end


class Part:
    """See the module's text. :func:`take_part` makes or adopts one."""

    def __init__(self, folder: Path, identity: Identity, segment_size: int) -> None:
        self.folder, self.identity = folder, identity
        self.meta = read_json(folder / "meta.json") or {}
        known = self.meta.get("segment")
        size = known if isinstance(known, int) and known > 0 else segment_size
        self.meta = {**self.meta, "identity": dataclasses.asdict(identity), "segment": size}
        flags = os.O_RDWR | os.O_CREAT
        with explained(folder):
            self.descriptor = os.open(folder / "data", flags, 0o644)
            self._progress = os.open(folder / "progress", flags, 0o644)
        self._unbuffered = _open_unbuffered(folder / "data")
        self.segments = [
            Segment(
                index,
                start,
                min(start + size, identity.size),
                min(start + self._counted(index), start + size, identity.size),
            )
            for index, start in enumerate(range(0, max(identity.size, 1), size))
        ]
        self.layout = Layout.identity(identity.size)
        self._segment_size, self._first_open, self._lock = size, 0, threading.Lock()
        self.resumed_bytes = self.written

    @property
    def written(self) -> int:
        """Source bytes that have been written."""
        return sum(segment.position - segment.start for segment in self.segments)

    @property
    def frontier(self) -> int:
        """All source bytes before this one have been written."""
        while self._first_open < len(self.segments):
            segment = self.segments[self._first_open]
            if not segment.is_complete:
                return segment.position
            self._first_open += 1
        return self.identity.size

    @property
    def sealed(self) -> dict[str, Any] | None:
        """Size and sha256 of the finished file, where it is finished."""
        return self.meta.get("sealed")

    def write(self, offset: int, data: bytes | memoryview, *, unbuffered: bool = False) -> int:
        """Write source bytes from ``offset`` and count them in their segments; return how many are new.

        Several threads may bring the same bytes (a server that ignores ranges sends them all to everybody).

        Args:
            offset: in the source.
            data: the bytes.
            unbuffered: nobody will read them back soon, and ``data`` begins at a page: they need not pass through the
                system's cache, which costs as much processor time as to receive them.
        """
        with explained(self.folder):
            if not (unbuffered and self._write_unbuffered(offset, data)):
                self.layout.write(self.descriptor, offset, data)
            with self._lock:
                return self._count(offset, offset + len(data))

    def _write_unbuffered(self, offset: int, data: bytes | memoryview) -> bool:
        """Write past the system's cache; false where that is not possible for these bytes, or on this disk at all."""
        fits = self.layout.is_identity and offset % ALIGNMENT == 0 and len(data) % ALIGNMENT == 0
        if not fits or self._unbuffered < 0:
            return False
        try:
            write_all(self._unbuffered, memoryview(data), offset)
        except OSError as error:
            if error.errno != errno.EINVAL:  # how a file system says that it wants another alignment, or none of this
                raise
            return False
        return True

    def _count(self, start: int, end: int) -> int:
        new = 0
        for index in range(start // self._segment_size, len(self.segments)):
            segment = self.segments[index]
            if segment.start >= end:
                break
            if max(start, segment.start) <= segment.position < end:
                reached = min(end, segment.end)
                new += reached - segment.position
                segment.position = reached
                os.pwrite(self._progress, _COUNT.pack(reached - segment.start), index * _COUNT.size)
        return new

    def save(self, **meta: object) -> None:
        """Remember facts about the part for the process that may have to go on with it."""
        if any(self.meta.get(key) != value for key, value in meta.items()):
            self.meta.update(meta)
            write_json(self.folder / "meta.json", self.meta)

    def seal(self, size: int, sha256: str) -> None:
        """Make the content durable and note that it is finished."""
        with explained(self.folder):
            os.fsync(self.descriptor)
            self.save(sealed={"size": size, "sha256": sha256})

    def truncate(self, size: int) -> None:
        """Cut off what lies behind the finished file; only after it was sealed."""
        if os.fstat(self.descriptor).st_size != size:
            os.ftruncate(self.descriptor, size)
            os.fsync(self.descriptor)

    def publish(self, directory: Path) -> None:
        """Move the finished file to its place and forget the rest."""
        publish(self.folder / "data", directory / self.identity.target)
        self.discard()

    def discard(self) -> None:
        """Delete the part."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Close the files; what was written stays for the next run."""
        for descriptor in (self.descriptor, self._progress, self._unbuffered):
            if descriptor >= 0:
                os.close(descriptor)
        self.descriptor = self._progress = self._unbuffered = -1

    def _counted(self, index: int) -> int:
        data = os.pread(self._progress, _COUNT.size, index * _COUNT.size)
        return _COUNT.unpack(data)[0] if len(data) == _COUNT.size else 0


def _open_unbuffered(path: Path) -> int:
    """Open a file for writes past the system's cache; -1 where the system or the file system has no such thing."""
    flag = getattr(os, "O_DIRECT", 0)
    try:
        return os.open(path, os.O_WRONLY | flag) if flag else -1
    except OSError:
        return -1


def take_part(directory: Path, identity: Identity, segment_size: int) -> Part:
    """Go on with the part that an ended process left, or begin a new one; worthless ones are deleted."""
    folder = directory / STATE_FOLDER / "parts"
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    mine = folder / f"{_key(identity.target)}.{_owner()}"
    left = [path for path in _left_behind(folder) if path.name.startswith(_key(identity.target))]
    usable = [path for path in left if _is_usable(path, identity)]
    usable.sort(key=_progress_of, reverse=True)
    if usable and usable[0] != mine and _rename(usable[0], mine):
        sync_folder(folder)
    for path in left:
        if path != mine:
            shutil.rmtree(path, ignore_errors=True)
    if mine.exists() and not _is_usable(mine, identity):
        shutil.rmtree(mine)
    mine.mkdir(exist_ok=True)
    part = Part(mine, identity, segment_size)
    part.save(owner=_owner())
    return part


def sweep(directory: Path, wanted: set[str]) -> None:
    """Delete what ended processes left for targets that nobody wants any more, and the folder where it is empty."""
    folder = directory / STATE_FOLDER / "parts"
    if not folder.is_dir():
        return
    keys = {_key(target) for target in wanted}
    for path in _left_behind(folder):
        if path.name.partition(".")[0] not in keys:
            shutil.rmtree(path, ignore_errors=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def bytes_on_disk(directory: Path, identity: Identity) -> int:
    """Source bytes of this identity that earlier runs have left."""
    folder = directory / STATE_FOLDER / "parts"
    if not folder.is_dir():
        return 0
    found = [path for path in _left_behind(folder) if path.name.startswith(_key(identity.target))]
    most = max((_progress_of(path) for path in found if _is_usable(path, identity)), default=0)
    return min(most, identity.size)


def _key(target: str) -> str:
    return hashlib.sha256(target.encode()).hexdigest()[:16]


def _owner() -> str:
    """This process: host, number, and when it began, since numbers are given again."""
    return f"{socket.gethostname()}~{os.getpid()}~{_started(os.getpid())}"


def _started(process: int) -> str:
    try:
        with open(f"/proc/{process}/stat", "rb") as stream:
            return stream.read().rpartition(b")")[2].split()[19].decode()
    except OSError:
        return "0"


def _is_alive(owner: str) -> bool:
    """Whether the process of that name still runs on this host; those of other hosts are held off by the lock."""
    host, _, rest = owner.partition("~")
    number, _, started = rest.partition("~")
    if host != socket.gethostname() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _started(int(number)) == started


def _left_behind(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        owner = path.name.partition(".")[2]
        if owner == _owner() or not _is_alive(owner):
            yield path


def _is_usable(path: Path, identity: Identity) -> bool:
    meta = read_json(path / "meta.json")
    return isinstance(meta, dict) and meta.get("identity") == dataclasses.asdict(identity)


def _progress_of(path: Path) -> int:
    try:
        data = (path / "progress").read_bytes()
    except OSError:
        return 0
    return sum(count for (count,) in _COUNT.iter_unpack(data[: len(data) // _COUNT.size * _COUNT.size]))


def _rename(source: Path, target: Path) -> bool:
    try:
        os.rename(source, target)
    except OSError:
        return False  # another process was faster; begin anew beside it
    return True
