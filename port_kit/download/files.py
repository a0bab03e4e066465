"""What several parts of the downloader do with files: durable writes, hashes, safe names, the directory's lock."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from port_kit.errors import DownloadError

STATE_FOLDER = ".port_kit"
_PIECE = 1 << 20
_SYNC_FILE_RANGE_WRITE = 2
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
_FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*\\]')
_LONGEST_NAME = 255  # bytes, of all common file systems
_LONGEST_PATH = 2048  # the system allows about twice that for the whole path
_DEEPEST = 64
_ROOM = 30  # bytes that a temporary file's name is longer


def check_relative_path(path: str, origin: str) -> None:
    """Refuse a path that could leave the model directory, or that some system cannot store.

    Raises:
        DownloadError: ``path_unsafe``.
    """
    parts = path.split("/")
    bad = [
        part
        for part in parts
        if part in ("", ".", "..") or _FORBIDDEN.search(part) or _RESERVED.fullmatch(part) or part[-1] in ". "
    ]
    storable = len(parts) < _DEEPEST and all(map(_is_storable, parts))
    if bad or parts[0].casefold() == STATE_FOLDER or not storable or len(path) > _LONGEST_PATH:
        raise DownloadError(
            f"{origin} names the path {path[:300]!r}, which cannot be stored safely under a model directory",
            code="path_unsafe",
            hint="take this file out of the recipe's patterns, and tell the repository's owner",
        )


def require_place(path: Path) -> None:
    """Refuse where a folder stands in a file's place, or a file in that of one of its folders.

    Raises:
        DownloadError: ``target_foreign``.
    """
    in_the_way = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if in_the_way is not None or path.is_dir():
        raise DownloadError(
            f"{in_the_way or path} is in the way: {path} is to be a file",
            code="target_foreign",
            hint="move it away, or choose another --output-dir",
        )


def _is_storable(part: str) -> bool:
    try:
        return len(part.encode()) <= _LONGEST_NAME
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold
        return False


def write_atomically(path: Path, content: str) -> None:
    """Write a text file so that it is there completely or not at all, also after a power cut."""
    temporary = temporary_for(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(path)
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        publish(temporary, path)


def temporary_for(path: Path) -> Path:
    """Return where this process writes what is to become ``path``."""
    return path.with_name(f"{_temporary_stem(path)}{os.getpid()}.tmp")


def sweep_temporaries(path: Path) -> None:
    """Delete what killed processes left of their attempts to write ``path``."""
    for left in path.parent.glob(f"{glob.escape(_temporary_stem(path))}*.tmp"):
        number = left.name.removesuffix(".tmp").rpartition(".")[2]
        if number.isdigit() and not Path(f"/proc/{number}").exists():
            left.unlink(missing_ok=True)


def _temporary_stem(path: Path) -> str:
    name = path.name
    if len(name.encode(errors="surrogateescape")) > _LONGEST_NAME - _ROOM:
        name = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
    return f".{name}."


def write_json(path: Path, value: object) -> None:
    """:func:`write_atomically` for JSON."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return a JSON file's content, or None where it is missing or is no JSON.

    Raises:
        DownloadError: ``output_dir`` where it may not be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise DownloadError(
            f"{path} cannot be read: {error.strerror}", code="output_dir", hint="correct its rights, or its disk"
        ) from error


def publish(temporary: Path, target: Path) -> None:
    """Give a finished file its name, durably."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, target)
    sync_folder(target.parent)


def allocate(descriptor: int, size: int) -> None:
    """Give an empty file its size (not 0), with blocks of the disk where the file system can: writing then costs less.

    ``os.posix_fallocate`` would write into every block where the file system cannot.

    Raises:
        OSError: the disk is full, or takes no file of that size.
    """
    call, number = _system_call("fallocate64"), errno.EINTR
    while call is not None and number == errno.EINTR:
        number = call(descriptor, 0, 0, size)
    if call is None or number in (errno.EOPNOTSUPP, errno.ENOSYS):
        os.truncate(descriptor, size)
    elif number:
        raise OSError(number, os.strerror(number))


def begin_writing_out(descriptor: int) -> None:
    """Let the system begin to bring a file's changed pages to the disk, so that the final fsync finds little to do."""
    call = _system_call("sync_file_range")
    if call is not None:
        call(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)  # a hint: errors show at the fsync


@cache
def _system_call(name: str) -> Callable[[int, int, int, int], int] | None:
    """A call of Linux's C library that Python lacks, which returns the error's number; None on other systems."""
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), name, None) if os.name == "posix" else None
    if call is None:
        return None
    offset = ctypes.c_int64
    call.argtypes = {
        "fallocate64": [ctypes.c_int, ctypes.c_int, offset, offset],
        "sync_file_range": [ctypes.c_int, offset, offset, ctypes.c_uint],
    }[name]
    return lambda *arguments: ctypes.get_errno() if call(*arguments) else 0


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a full disk, missing rights and whatever else a system says into an error of the kit."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"no space left on the disk of {path}",
                code="disk_full",
                hint="free some space and run the same command again: what was fetched is kept",
            ) from error
        if error.errno == errno.EFBIG:
            raise DownloadError(
                f"the disk of {path} takes no file of that size",
                code="file_too_large",
                hint="choose an --output-dir on another file system (FAT32 ends at 4 GB a file), or raise `ulimit -f`",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DownloadError(
                f"{path} may not be written", code="output_dir", hint="choose another --output-dir"
            ) from error
        raise DownloadError(
            f"{error.filename or path} cannot be used: {error.strerror or error}",
            code="output_dir",
            hint="choose another --output-dir, or see what is in the way there",
        ) from error


def free_space(directory: Path) -> int:
    """Return the bytes that may still be written where ``directory`` is or will be."""
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def require_space(directory: Path, needed: int) -> None:
    """Raise ``disk_full`` where the disk cannot take so many bytes more."""
    free = free_space(directory)
    if needed > free:
        raise DownloadError(
            f"{needed} bytes are needed at {directory}, {free} are free",
            code="disk_full",
            hint="free some space, or choose another disk",
            needed=needed,
            free=free,
        )


def remove_empty_folders(directory: Path, folders: set[Path]) -> None:
    """Only folders that held our files, from the deepest up."""
    for folder in sorted(folders, key=lambda item: len(item.parts), reverse=True):
        while folder != Path():
            path = directory / folder
            if not path.is_dir() or any(path.iterdir()):
                break
            path.rmdir()
            folder = folder.parent


def digests_of(path: Path, *, git: bool, advance: Callable[[int], None] = lambda count: None) -> dict[str, str]:
    """Return ``{"sha256": hex}`` of a file, with ``"git"`` (the blob hash) beside it on request."""
    hashes = hashes_for(path.stat().st_size, git=git)
    buffer = memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            for item in hashes.values():
                item.update(buffer[:count])
            advance(count)
    return {name: item.hexdigest() for name, item in hashes.items()}


def hashes_for(size: int, *, git: bool) -> dict[str, Any]:
    """Return fresh hash objects by name for content of ``size`` bytes."""
    hashes: dict[str, Any] = {"sha256": hashlib.sha256()}
    if git:
        hashes["git"] = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    return hashes


@contextmanager
def directory_lock(directory: Path, notice: Callable[[str], None]) -> Iterator[None]:
    """Hold the model directory while it is worked on; a second process waits until the first has ended.

    The system gives the lock back when its holder dies. Where locks do nothing (some network file systems), work is
    done twice, but never wrongly: parts carry their owner's name and are published by rename.
    """
    begun, told = time.monotonic(), False
    while True:
        with _open_lock(directory) as stream:
            if _try_lock(stream.fileno()) and _is_still(stream, directory):
                stream.truncate(0)
                host = os.uname().nodename if hasattr(os, "uname") else "this machine"
                stream.write(f"process {os.getpid()} on {host}\n")
                stream.flush()
                yield
                return
            if not told and time.monotonic() - begun > 1.0:
                stream.seek(0)
                notice(f"waiting for another download into {directory} ({stream.read().strip() or 'unknown process'})")
                told = True
        time.sleep(0.1)


def _open_lock(directory: Path) -> TextIO:
    folder = directory / STATE_FOLDER
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / "lock").open("a+")


def _is_still(stream: TextIO, directory: Path) -> bool:
    """Whether a lock's file is still there: whoever held it may have taken the whole directory away."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(directory / STATE_FOLDER / "lock"))
    except FileNotFoundError:
        return False


def may_lock(directory: Path) -> bool:
    """Whether this process may take the lock of an existing directory, which is a file in it."""
    folder = directory / STATE_FOLDER
    lock = folder / "lock"
    return os.access(lock if lock.exists() else folder if folder.exists() else directory, os.W_OK)


def _try_lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return True  # no locks here; see the docstring of directory_lock
        raise
    return True
