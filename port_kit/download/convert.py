"""A torch checkpoint on disk becomes a safetensors file: flat memory, nothing executed, CRC checked on the way."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from port_kit.byte_source import FileSource
from port_kit.download.blueprint import Blueprint, draw, is_made_from, require_crc
from port_kit.download.files import (
    begin_writing_out,
    explained,
    publish,
    require_space,
    sweep_temporaries,
    temporary_for,
)
from port_kit.download.layout import Layout, write_all
from port_kit.errors import DownloadError
from port_kit.pickles import Storage, read_tables

_PIECE = 1 << 20
_LONGEST_PART = 16 << 20
_THREADS = max(2, min(4, os.cpu_count() or 1))
_POLYNOMIAL = 0xEDB88320


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
    """Copy the used storages, several parts at a time, and compare their checksums with the zip directory's."""
    layout, size = blueprint.layout(), blueprint.size
    threads, stopped = threading.local(), threading.Event()

    def copy(part: _Part) -> int:
        """Read, write and checksum a part; all three leave the interpreter to the other threads."""
        if not hasattr(threads, "buffer"):
            threads.buffer = memoryview(bytearray(_PIECE))
        value = 0
        for offset in range(part.start, part.end, _PIECE):
            view = threads.buffer[: min(_PIECE, part.end - offset)]
            if stopped.is_set():
                return 0
            _fill(view, source, offset)
            _place(layout, size, descriptor, offset, view)
            value = crc32(view, value) if part.storage.crc is not None else 0
            advance(len(view))
        begin_writing_out(descriptor)
        return value

    parts = [part for key, storage in blueprint.used_storages.items() for part in _parts(key, storage)]
    values: dict[str, int] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for part, value in zip(parts, pool.map(copy, parts), strict=True):
                joined = join_crcs(values.get(part.key, 0), value, part.end - part.start)
                values[part.key] = joined
                if part.end == part.storage.offset + part.storage.nbytes:
                    require_crc(part.storage, part.key, joined, source.name)
        except BaseException:
            stopped.set()
            raise


class _Part(NamedTuple):
    """Bytes ``[start, end)`` of the source file, in one storage."""

    key: str
    storage: Storage
    start: int
    end: int


def _parts(key: str, storage: Storage) -> Iterator[_Part]:
    end = storage.offset + storage.nbytes
    for start in range(storage.offset, max(end, storage.offset + 1), _LONGEST_PART):
        yield _Part(key, storage, start, min(end, start + _LONGEST_PART))


def _fill(view: memoryview, source: FileSource, offset: int) -> None:
    while view:
        count = source.read_into(view, offset)
        if count == 0:
            raise DownloadError(f"{source.name} became shorter while it was read", code="source_missing")
        view, offset = view[count:], offset + count


def _place(layout: Layout, size: int, descriptor: int, offset: int, view: memoryview) -> None:
    """Write the pieces that belong into the file; what the layout puts behind its end is gathered later."""
    for start, length, target in layout.pieces(offset, len(view)):
        if target < size:
            write_all(descriptor, view[start : start + length], target)


def join_crcs(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of two parts in a row from those of the parts; ``length`` is that of the second, bytes.

    A CRC is linear: behind the second part, each bit of the first one's CRC stands for a known other value.
    """
    if first == 0:
        return second
    for value in _shifts(length):
        if first & 1:
            second ^= value
        first >>= 1
    return second


@lru_cache(maxsize=64)
def _shifts(length: int) -> tuple[int, ...]:
    """What each bit of a CRC-32 becomes behind ``length`` zero bytes."""
    one_bit = [_POLYNOMIAL, *(1 << bit for bit in range(31))]  # behind a zero bit
    power, result = one_bit, [1 << bit for bit in range(32)]
    count = length * 8
    while count:
        if count & 1:
            result = [_apply(power, value) for value in result]
        power = [_apply(power, value) for value in power]
        count >>= 1
    return tuple(result)


def _apply(matrix: Sequence[int], value: int) -> int:
    result = 0
    for column in matrix:
        if value & 1:
            result ^= column
        value >>= 1
    return result
