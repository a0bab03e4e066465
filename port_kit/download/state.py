"""The kit's own folder in a model directory, its lock, and every deletion.

Isolation: the kit writes and deletes only inside the model directory, and deletes only what it created.

* A symbolic or hard link in ``.port_kit`` is an error, or is left alone; it is never followed.
* :func:`remove_file` is the only way to a deletion by target. It does not pass a folder that is a symbolic link.
* ``port.lock`` records files that were adopted, which are never deleted or replaced.
* Only names of the kit's own form are deleted in ``.port_kit``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TextIO

from port_kit.errors import DownloadError
from port_kit.files import os_errors_as

STATE_FOLDER = ".port_kit"
# One thread per directory: threads of a process share the name by which partial downloads are told apart.
_threads: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


def state_path(directory: Path, *names: str) -> Path:
    """Return a path in the state folder. A folder that is a symbolic link is refused: ``output_dir``."""
    path = directory / STATE_FOLDER
    for name in (*names, ""):
        if path.is_symlink():
            raise _not_ours(path)
        path /= name
    return path


def open_state_file(path: Path, flags: int) -> int:
    """Open a regular file of the state folder. A link, a device or a pipe is refused: ``output_dir``."""
    with os_errors_as(path):
        try:
            descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise _not_ours(path) from error
            raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise _not_ours(path)
    return descriptor


def _not_ours(path: Path) -> DownloadError:
    return DownloadError(
        f"{path} is a link, or no plain file: port-kit did not create it, and follows no links in its own folder",
        code="output_dir",
        hint="move it away, or choose another --output-dir",
    )


def is_behind_link(directory: Path, target: str | PurePosixPath) -> bool:
    """Return True if a folder between ``directory`` and ``target`` is a symbolic link."""
    parents = list(PurePosixPath(target).parents)[:-1]
    return any((directory / parent).is_symlink() for parent in parents)


def remove_file(directory: Path, target: str) -> bool:
    """Delete a file of the directory; return False if it is absent, a folder, or behind a linked folder."""
    path = directory / target
    if is_behind_link(directory, target) or (path.is_dir() and not path.is_symlink()):
        return False
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def remove_empty_folders(directory: Path, targets: Iterable[str]) -> None:
    """Delete the folders of these targets that are empty, from the deepest up."""
    folders = {PurePosixPath(target).parent for target in targets}
    for folder in sorted(folders, key=lambda item: len(item.parts), reverse=True):
        while folder != PurePosixPath():
            path = directory / folder
            if path.is_symlink() or is_behind_link(directory, folder) or not path.is_dir() or any(path.iterdir()):
                break
            path.rmdir()
            folder = folder.parent


@contextmanager
def directory_lock(directory: Path, notice: Callable[[str], None]) -> Iterator[bool]:
    """Hold the model directory; a second process waits until the first has ended.

    Yields False if locks have no effect here (some network file systems). Processes may then work at the same time:
    each writes partial downloads of its own, takes over none of another host, and publishes by rename.
    """
    begun, told, thread = time.monotonic(), False, _threads[os.path.realpath(directory)]
    while True:
        with _open_lock(directory) as stream:
            free = thread.acquire(blocking=False)
            try:
                locked = _try_lock(stream.fileno()) if free else False
                if locked is not False and _is_still(stream, directory):
                    exclusive = bool(locked) and not _can_lock_again(directory)
                    stream.truncate(0)
                    stream.write(f"process {os.getpid()} on {os.uname().nodename}\n")
                    stream.flush()
                    yield exclusive
                    return
            finally:
                if free:
                    thread.release()
            if not told and time.monotonic() - begun > 1.0:
                holder = stream.read().strip() or "unknown process"
                notice(f"waiting for another download into {directory} ({holder})")
                told = True
        time.sleep(0.1)


def _open_lock(directory: Path) -> TextIO:
    path = state_path(directory) / "lock"
    with os_errors_as(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return os.fdopen(open_state_file(path, os.O_RDWR | os.O_CREAT), "r+")


def _is_still(stream: TextIO, directory: Path) -> bool:
    """Return True if the lock's file is still there; its last holder may have removed the directory."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(directory / STATE_FOLDER / "lock"))
    except FileNotFoundError:
        return False


def _can_lock_again(directory: Path) -> bool:
    """Return True if a lock that is held can be taken once more: such a lock excludes no process."""
    with _open_lock(directory) as stream:
        return _try_lock(stream.fileno()) is not False


def may_lock(directory: Path) -> bool:
    """Return True if this process may take the lock of an existing directory, which is a file in it."""
    folder = state_path(directory)
    lock = folder / "lock"
    return os.access(lock if lock.exists() else folder if folder.exists() else directory, os.W_OK)


def _try_lock(descriptor: int) -> bool | None:
    """Return True if the lock is taken, False if another process has it, None if there are no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return None
        raise
    return True
