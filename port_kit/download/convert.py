"""A torch checkpoint on disk becomes a safetensors file: flat memory, nothing executed, CRC checked on the way."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from zlib import crc32

from port_kit.byte_source import FileSource
from port_kit.download.blueprint import Blueprint, draw, is_made_from, require_crc
from port_kit.download.files import explained, publish, require_space, sweep_temporaries, temporary_for
from port_kit.download.layout import Layout, write_all
from port_kit.errors import CheckpointError, DownloadError
from port_kit.pickles import Storage, read_tables

_PIECE = 1 << 20
_BUFFERS = 4


@dataclass(frozen=True)
class Conversion:
    """What a conversion did; ``unchanged`` where the target was already made from this very content."""

    source: Path
    target: Path
    tensors: int
    size: int
    unchanged: bool


def convert_file(
    source: str | Path,
    target: str | Path,
    *,
    wrapper: str = "",
    drop: Sequence[str] = (),
    remember: bool = True,
    advance: Callable[[int], None] = lambda count: None,
) -> Conversion:
    """Write the tensors of a ``.pth``, ``.pt`` or ``.bin`` file as a safetensors file with the same names.

    Args:
        source: the checkpoint, zip or legacy container.
        target: the file to write; it appears complete or not at all.
        wrapper: the keys above the tensors, dotted.
        drop: values that are left out on purpose.
        remember: note the source's fingerprint in the header, so that a second call finds nothing to do.
        advance: called with the number of source bytes that were copied.

    Raises:
        CheckpointError: the source is damaged, unsafe, or holds what safetensors cannot.
        DownloadError: the target cannot be written.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise DownloadError(f"there is no file {source}", code="source_missing", hint="check the path")
    with explained(target):
        if target.exists() and target.samefile(source):
            raise DownloadError(f"{target} is the source itself", code="output_dir", hint="name another target")
        if target.exists() and not target.is_file():
            raise DownloadError(f"{target} is no file", code="output_dir", hint="name the file that is to be written")
    with _opened(source) as opened:
        tables = read_tables(opened, wrapper)
        blueprint = draw(tables, opened.name, drop=drop, remember=remember)
        done = Conversion(source, target, len(blueprint.placements), blueprint.size, unchanged=False)
        if remember and is_made_from(target, tables):
            return Conversion(source, target, done.tensors, done.size, unchanged=True)
        _write(blueprint, opened, target, advance)
    return done


def _opened(source: Path) -> FileSource:
    try:
        return FileSource(source)
    except OSError as error:
        raise DownloadError(
            f"{source} cannot be read: {error.strerror}", code="source_missing", hint="check the file's rights"
        ) from error


def _write(blueprint: Blueprint, source: FileSource, target: Path, advance: Callable[[int], None]) -> None:
    temporary = temporary_for(target)
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(target)
        require_space(target.parent, blueprint.size)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.truncate(descriptor, blueprint.size)
            _copy_storages(blueprint, source, descriptor, advance)
            blueprint.complete(source, descriptor)
            os.fsync(descriptor)
            publish(temporary, target)
        finally:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)


def _copy_storages(blueprint: Blueprint, source: FileSource, descriptor: int, advance: Callable[[int], None]) -> None:
    """Copy in the order of the source; the checksums are computed beside it, on another core."""
    layout = blueprint.layout()
    with _Checksums(source.name) as checksums:
        for key, storage in blueprint.used_storages.items():
            for offset in range(storage.offset, storage.offset + storage.nbytes, _PIECE):
                length = min(_PIECE, storage.offset + storage.nbytes - offset)
                view = checksums.buffer()[:length]
                count = 0
                while count < length:
                    count += _read_some(source, view[count:], offset + count)
                _place(layout, blueprint.size, descriptor, offset, view)
                checksums.add(key, storage, view)
                advance(length)
            checksums.end(key, storage)


def _read_some(source: FileSource, view: memoryview, offset: int) -> int:
    count = source.read_into(view, offset)
    if count == 0:
        raise DownloadError(f"{source.name} became shorter while it was read", code="source_missing")
    return count


def _place(layout: Layout, size: int, descriptor: int, offset: int, view: memoryview) -> None:
    """Write the pieces that belong into the file; what the layout puts behind its end is gathered later."""
    for start, length, target in layout.pieces(offset, len(view)):
        if target < size:
            write_all(descriptor, view[start : start + length], target)


class _Checksums:
    """CRC-32 of storages in a thread, with a few buffers that go round. Errors surface at the end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._free: Queue[memoryview] = Queue()
        self._work: Queue[tuple[str, Storage, memoryview | None] | None] = Queue()
        self._values: dict[str, int] = {}
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        for _ in range(_BUFFERS):
            self._free.put(memoryview(bytearray(_PIECE)))

    def buffer(self) -> memoryview:
        """Return a buffer that nobody reads; hand it back with :meth:`add`."""
        if self._failure is not None:
            raise self._failure
        return self._free.get()

    def add(self, key: str, storage: Storage, view: memoryview) -> None:
        """Take the next bytes of a storage."""
        self._work.put((key, storage, view))

    def end(self, key: str, storage: Storage) -> None:
        """The storage is complete: compare."""
        self._work.put((key, storage, None))

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            key, storage, view = item
            if view is not None:
                if storage.crc is not None:
                    self._values[key] = crc32(view, self._values.get(key, 0))
                self._free.put(memoryview(view.obj))
            elif storage.crc is not None and self._failure is None:
                self._compare(key, storage)

    def _compare(self, key: str, storage: Storage) -> None:
        try:
            require_crc(storage, key, self._values.get(key, 0), self._name)
        except CheckpointError as error:
            self._failure = error

    def __enter__(self) -> _Checksums:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._work.put(None)
        self._thread.join()
        if kind is None and self._failure is not None:
            raise self._failure
