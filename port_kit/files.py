"""File operations: durable writes, hashes, free space, and translation of system errors."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from port_kit.errors import DownloadError
from port_kit.escape import MAX_REASON, reason_of, shortened
from port_kit.owner import OWNER, may_run, owner

#: Variable of the environment with the folder of :func:`cache_folder`.
CACHE_VARIABLE = "PORT_KIT_CACHE"
#: Characters of a text file; the manifest of a large checkpoint has 10 million.
MAX_TEXT = 1 << 26
_PIECE = 1 << 20
_SYNC_FILE_RANGE_WRITE = 2
_LONGEST_NAME = 255  # bytes, of all common file systems
_SUFFIX_LENGTH = 130  # bytes that the name of a temporary file adds


def cache_folder() -> Path:
    """Return the user's folder of files that the kit makes again if they are gone; it may not exist."""
    given = os.environ.get(CACHE_VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(given).absolute() if given else (Path(home) if home else Path.home() / ".cache") / "port_kit"


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a file that a user names; a device may have no end.

    Raises:
        OSError: also if it has more than :data:`MAX_TEXT` characters.
        UnicodeDecodeError: it is no text.
    """
    with path.open(encoding=encoding) as stream:
        text = stream.read(MAX_TEXT + 1)
    if len(text) > MAX_TEXT:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return text


def write_atomically(path: Path, content: str) -> None:
    """Write a text file atomically and durably: after a crash it is complete or absent."""
    with os_errors_as(path):
        temporary, descriptor = create_temporary(path)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        publish(temporary, path)


def create_temporary(path: Path) -> tuple[Path, int]:
    """Create a temporary file for ``path``, and delete those of processes that have ended.

    Returns:
        The path of the temporary file and a descriptor for reading and writing.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = _temporary_stem(path)
    ours = re.compile(rf"{re.escape(stem)}({OWNER})~[0-9a-f]+\.tmp")
    for left in path.parent.glob(f"{glob.escape(stem)}*.tmp"):
        found = ours.fullmatch(left.name)
        if found and not may_run(found[1], elsewhere=True):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f"{stem}{owner()}~{secrets.token_hex(4)}.tmp")
    return temporary, os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)


def _temporary_stem(path: Path) -> str:
    name = path.name
    if len(name.encode(errors="surrogateescape")) > _LONGEST_NAME - _SUFFIX_LENGTH:
        name = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
    return f".{name}."


def write_json(path: Path, value: object) -> None:
    """Write JSON with :func:`write_atomically`."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return a JSON file's content, or None if it is missing or not JSON.

    Raises:
        DownloadError: ``output_dir`` if the file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise DownloadError(
            f"{path} cannot be read: {error.strerror}",
            code="output_dir",
            hint="check its permissions and its disk",
        ) from error


def publish(temporary: Path, target: Path) -> None:
    """Rename a complete file to its final name, durably."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, target)
    sync_folder(target.parent)


def allocate(descriptor: int, size: int) -> None:
    """Set the size of an empty file (not to 0), and allocate disk blocks if the file system supports it.

    Allocation makes writes cheaper. ``os.posix_fallocate`` is not used, because it writes to every block if the file
    system does not support allocation.

    Raises:
        OSError: the disk is full, or does not support files of that size.
    """
    call, number = _system_call("fallocate64"), errno.EINTR
    while call is not None and number == errno.EINTR:
        number = call(descriptor, 0, 0, size)
    if call is None or number in (errno.EOPNOTSUPP, errno.ENOSYS):
        os.truncate(descriptor, size)
    elif number:
        raise OSError(number, os.strerror(number))


def begin_writing_out(descriptor: int) -> None:
    """Start writing a file's dirty pages to disk, so that the final fsync is short."""
    call = _system_call("sync_file_range")
    if call is not None:
        call(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)  # best effort; fsync reports errors


@cache
def _system_call(name: str) -> Callable[[int, int, int, int], int] | None:
    """Return a function of Linux's C library that returns an error number, or None on other systems."""
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
    """Make the directory entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def os_errors_as(path: Path, code: str = "output_dir", hint: str = "choose another --output-dir") -> Iterator[None]:
    """Raise operating-system errors, such as a full disk or missing permissions, as errors of the kit about a file.

    Args:
        path: the file in use. If the system names a file outside of it, that file is reported.
        code, hint: of the error if ``path`` cannot be used.
    """
    try:
        yield
    except OSError as error:
        raise _os_error(error, path, code, hint) from error


def _os_error(error: OSError, path: Path, code: str, hint: str) -> DownloadError:
    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else path
    file = shortened(str(named), MAX_REASON)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(
            f"no space left on the disk of {file}",
            code="disk_full",
            hint="free some space and run the command again; it resumes the download",
        )
    if error.errno == errno.EFBIG:
        return DownloadError(
            f"the disk of {file} does not support files of that size",
            code="file_too_large",
            hint="choose an --output-dir on another file system (FAT32 allows 4 GB per file), or raise `ulimit -f`",
        )
    message = f"{file} cannot be used: {error.strerror or reason_of(error)}"
    if named != path and path not in named.parents and named not in path.parents:
        return DownloadError(message, code="file_access", hint=f"check the permissions of {file} and its disk")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        message = f"{file} cannot be read or written: {error.strerror}"
    return DownloadError(message, code=code, hint=f"{hint}, or check the existing file")


def free_space(directory: Path) -> int:
    """Return the free bytes of the disk of ``directory``, which need not exist yet."""
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def require_space(directory: Path, needed: int) -> None:
    """Raise ``disk_full`` if the disk has fewer free bytes than needed."""
    free = free_space(directory)
    if needed > free:
        raise DownloadError(
            f"{needed} bytes are needed at {directory}, {free} are free",
            code="disk_full",
            hint="free some space, or choose another disk",
            needed=needed,
            free=free,
        )


def digests_of(path: Path, *, git: bool, advance: Callable[[int], None] = lambda count: None) -> dict[str, str]:
    """Return ``{"sha256": hex}`` of a file, and ``"git"`` (the blob hash) if requested."""
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
