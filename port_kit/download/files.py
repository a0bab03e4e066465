"""What several parts of the downloader do with files: durable writes, hashes, safe names, the directory's lock."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from port_kit.errors import DownloadError

STATE_FOLDER = ".port_kit"
_PIECE = 1 << 20
_SYNC_FILE_RANGE_WRITE = 2
_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
_FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*\\]')


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
    if bad or parts[0] == STATE_FOLDER:
        raise DownloadError(
            f"{origin} names the path {path!r}, which cannot be stored safely under a model directory",
            code="path_unsafe",
            hint="take this file out of the recipe's patterns, and tell the repository's owner",
        )


def write_atomically(path: Path, content: str) -> None:
    """Write a text file so that it is there completely or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(path)
    temporary = temporary_for(path)
    with explained(path):
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        publish(temporary, path)


def temporary_for(path: Path) -> Path:
    """Return where this process writes what is to become ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sweep_temporaries(path: Path) -> None:
    """Delete what killed processes left of their attempts to write ``path``."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        number = left.name.removesuffix(".tmp").rpartition(".")[2]
        if number.isdigit() and not Path(f"/proc/{number}").exists():
            left.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """:func:`write_atomically` for JSON."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return a JSON file's content, or None where it is missing or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def publish(temporary: Path, target: Path) -> None:
    """Give a finished file its name, durably."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, target)
    sync_folder(target.parent)


def begin_writing_out(descriptor: int) -> None:
    """Let the system begin to bring a file's changed pages to the disk, so that the final fsync finds little to do."""
    call = _sync_file_range()
    if call is not None:
        call(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)  # a hint: errors show at the fsync


@cache
def _sync_file_range() -> Callable[..., int] | None:
    """The system call, where the C library has it (Linux)."""
    import ctypes

    call = getattr(ctypes.CDLL(None), "sync_file_range", None) if os.name == "posix" else None
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call


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
    """Turn a full disk, missing rights or an impossible path into an error that says so."""
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
        if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise DownloadError(
                f"{path} cannot be written: {error.strerror}", code="output_dir", hint="choose another place"
            ) from error
        raise


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
    folder = directory / STATE_FOLDER
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / "lock").open("a+")
    with stream:
        begun, told = time.monotonic(), False
        while not _try_lock(stream.fileno()):
            if not told and time.monotonic() - begun > 1.0:
                stream.seek(0)
                notice(f"waiting for another download into {directory} ({stream.read().strip() or 'unknown process'})")
                told = True
            time.sleep(0.1)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {os.uname().nodename if hasattr(os, 'uname') else 'this machine'}\n")
        stream.flush()
        yield


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
