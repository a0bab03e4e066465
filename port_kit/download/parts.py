"""A partial download: a file's bytes so far, and how many of them there are.

``.port_kit/parts/<key>.<owner>/`` holds ``data``, ``progress`` (one count per segment, written after the bytes that it
counts) and ``meta.json`` (the file's specification, the segment size). All three are hints: a file gets its final name
only after its bytes were read back or received, and hashed. A partial download belongs to one process. A later process
takes it over by renaming the folder, which only one can do, after the owner has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import re
import shutil
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from port_kit.checkpoint.byte_layout import ByteLayout, write_all
from port_kit.download.state import open_state_file, state_path
from port_kit.files import os_errors_as, publish, read_json, write_json
from port_kit.owner import OWNER, may_run, owner

_COUNT = struct.Struct("<Q")
_NAME = re.compile(rf"([0-9a-f]{{16}})\.({OWNER})")
_MOST_SEGMENTS = 1 << 17
#: alignment of offset, length and address in unbuffered writes: the memory page, and no disk's sectors are larger
ALIGNMENT = 4096


@dataclass(frozen=True)
class FileSpec:
    """A file of a model directory and its source; a partial download of another specification is worthless.

    Attributes:
        target: path in the model directory.
        repo_id, commit, path: location of the source.
        size: of the source, bytes.
        digest: of the source, ``sha256:...`` or ``git:...``.
        convert, wrapper, drop: see :class:`~port_kit.download.recipe.FileRule`.
    """

    target: str
    repo_id: str
    commit: str
    path: str
    size: int
    digest: str
    convert: bool = False
    wrapper: str = ""
    drop: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the plain form."""
        return {**dataclasses.asdict(self), "drop": list(self.drop)}

    @property
    def key(self) -> str:
        """A hash of all fields."""
        return hashlib.sha256(repr(dataclasses.astuple(self)).encode(errors="surrogatepass")).hexdigest()


@dataclass
class Segment:
    """A range of the source. Bytes ``[start, position)`` have been written; the lock's holder may write the next."""

    index: int
    start: int
    end: int
    position: int
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def is_complete(self) -> bool:
        """Return True if no byte is missing."""
        return self.position >= self.end


class PartialDownload:
    """The files of one partial download; :func:`acquire` makes or takes over one.

    Attributes:
        spec: the final file.
        segments: its ranges, in order.
        layout: offsets of the source's bytes in ``data``.
    """

    def __init__(self, folder: Path, spec: FileSpec, segment_size: int) -> None:
        self.folder, self.spec = folder, spec
        meta = read_json(folder / "meta.json") or {}
        size = meta.get("segment")
        if not isinstance(size, int) or size <= 0 or spec.size // size > _MOST_SEGMENTS:
            size = segment_size
        self.descriptor = open_state_file(folder / "data", os.O_RDWR | os.O_CREAT)
        self._progress = open_state_file(folder / "progress", os.O_RDWR | os.O_CREAT)
        self._unbuffered = _open_unbuffered(folder / "data", self.descriptor)
        self.segments = []
        for index, start in enumerate(range(0, max(spec.size, 1), size)):
            end = min(start + size, spec.size)
            self.segments.append(Segment(index, start, end, min(start + self._counted(index), end)))
        self.layout = ByteLayout.identity(spec.size)
        self._first_open = 0
        if meta != (now := {"spec": spec.to_json(), "segment": size}):
            write_json(folder / "meta.json", now)

    @property
    def written(self) -> int:
        """Source bytes that have been written."""
        return sum(segment.position - segment.start for segment in self.segments)

    @property
    def contiguous_bytes(self) -> int:
        """All source bytes before this one have been written."""
        while self._first_open < len(self.segments):
            segment = self.segments[self._first_open]
            if not segment.is_complete:
                return segment.position
            self._first_open += 1
        return self.spec.size

    def append(self, segment: Segment, data: memoryview, *, unbuffered: bool) -> None:
        """Write the next bytes of a segment, whose lock is held, and count them.

        ``unbuffered``: they are not read back soon, and ``data`` begins at a page. They need not pass through the
        system's cache, which costs as much processor time as to receive them.
        """
        with os_errors_as(self.folder):
            if not (unbuffered and self._write_unbuffered(segment.position, data)):
                self.layout.write(self.descriptor, segment.position, data)
            segment.position += len(data)
            count = _COUNT.pack(segment.position - segment.start)
            os.pwrite(self._progress, count, segment.index * _COUNT.size)

    def _write_unbuffered(self, offset: int, data: memoryview) -> bool:
        """Write past the system's cache; return False if these bytes or this disk do not allow it."""
        fits = self.layout.is_identity and offset % ALIGNMENT == 0 and len(data) % ALIGNMENT == 0
        if not fits or self._unbuffered < 0:
            return False
        try:
            write_all(self._unbuffered, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system requires another alignment, or has no direct I/O
                raise
            return False
        return True

    def publish(self, directory: Path, size: int) -> None:
        """Give the file its final size, make it durable, move it to its place, and delete the rest."""
        os.ftruncate(self.descriptor, size)
        os.fsync(self.descriptor)
        publish(self.folder / "data", directory / self.spec.target)
        self.discard()

    def discard(self) -> None:
        """Delete the partial download."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Close the files; written bytes are kept for the next run."""
        for descriptor in (self.descriptor, self._progress, self._unbuffered):
            if descriptor >= 0:
                os.close(descriptor)
        self.descriptor = self._progress = self._unbuffered = -1

    def _counted(self, index: int) -> int:
        data = os.pread(self._progress, _COUNT.size, index * _COUNT.size)
        return _COUNT.unpack(data)[0] if len(data) == _COUNT.size else 0


def _open_unbuffered(path: Path, same_as: int) -> int:
    """Open a file once more for writes past the system's cache; -1 if the file system has no such thing."""
    flag = getattr(os, "O_DIRECT", 0)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | flag) if flag else -1
    except OSError:
        return -1
    if descriptor >= 0 and not os.path.samestat(os.fstat(descriptor), os.fstat(same_as)):
        os.close(descriptor)
        return -1
    return descriptor


def acquire(directory: Path, spec: FileSpec, segment_size: int, *, exclusive: bool) -> PartialDownload:
    """Resume the partial download of an ended process, or start a new one; delete those that do not match.

    ``exclusive``: the directory's lock keeps other hosts out, so that theirs have ended.
    """
    folder = state_path(directory, "parts")
    name = f"{_key(spec.target)}.{owner()}"
    with os_errors_as(folder):
        folder.mkdir(parents=True, exist_ok=True)
        left = [path for path in _abandoned(folder, exclusive) if path.name.startswith(_key(spec.target))]
        usable = sorted((path for path in left if _matches(path, spec)), key=_progress_of, reverse=True)
        if usable and usable[0].name != name:
            with contextlib.suppress(OSError):  # another process was faster: start a new one beside it
                os.rename(usable[0], folder / name)
        for path in left:
            if path.name != name:
                shutil.rmtree(path, ignore_errors=True)
        if (folder / name).exists() and not _matches(folder / name, spec):
            shutil.rmtree(folder / name)
        (folder / name).mkdir(parents=True, exist_ok=True)
        return PartialDownload(folder / name, spec, segment_size)


def remove_stale(directory: Path, wanted: set[str], *, exclusive: bool) -> None:
    """Delete partial downloads of ended processes for targets that are no longer wanted, and an empty folder."""
    folder = state_path(directory, "parts")
    if not folder.is_dir():
        return
    keys = {_key(target) for target in wanted}
    for path in _abandoned(folder, exclusive):
        if path.name.partition(".")[0] not in keys:
            shutil.rmtree(path, ignore_errors=True)
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def resumable_bytes(directory: Path, spec: FileSpec, *, exclusive: bool) -> int:
    """Return how many source bytes of this file earlier runs have left."""
    folder = state_path(directory, "parts")
    left = _abandoned(folder, exclusive) if folder.is_dir() else ()
    found = [path for path in left if path.name.startswith(_key(spec.target))]
    most = max((_progress_of(path) for path in found if _matches(path, spec)), default=0)
    return min(most, spec.size)


def _key(target: str) -> str:
    return hashlib.sha256(target.encode()).hexdigest()[:16]


def _abandoned(folder: Path, exclusive: bool) -> Iterator[Path]:
    """Yield the partial downloads of this process and of ended ones; ignores other entries of the folder."""
    for path in sorted(folder.iterdir()):
        found = _NAME.fullmatch(path.name)
        if found is None or path.is_symlink() or not path.is_dir():
            continue
        if found[2] == owner() or not may_run(found[2], elsewhere=not exclusive):
            yield path


def _matches(path: Path, spec: FileSpec) -> bool:
    """Return True if a partial download is one of this file, in plain files."""
    plain = not any((path / name).is_symlink() for name in ("data", "progress", "meta.json"))
    single = all((path / name).stat().st_nlink == 1 for name in ("data", "progress") if (path / name).exists())
    meta = read_json(path / "meta.json") if plain and single else None
    return isinstance(meta, dict) and meta.get("spec") == spec.to_json()


def _progress_of(path: Path) -> int:
    try:
        data = (path / "progress").read_bytes()
    except OSError:
        return 0
    return sum(count for (count,) in _COUNT.iter_unpack(data[: len(data) // _COUNT.size * _COUNT.size]))
