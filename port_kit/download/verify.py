"""Is the model directory what its lock says? By size on every run, by hash on request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from port_kit.download.http import Interrupted
from port_kit.download.lock import Lock
from port_kit.download.plan import MODEL_INDEX
from port_kit.files import digests_of

_HASHERS = 4


def expected_files(lock: Lock) -> Iterator[tuple[str, int, str]]:
    """Yield ``(target, size, sha256)`` of everything that a complete lock vouches for."""
    for target, item in lock.files.items():
        yield target, -1 if item.size is None else item.size, item.sha256 or ""
    for target, written in lock.written.items():
        yield target, written["size"], written["sha256"]


def missing_or_resized(directory: Path, lock: Lock) -> list[str]:
    """Return the targets that are absent or have another size than the lock says; reads no content."""
    found = []
    for target, size, _ in expected_files(lock):
        path = directory / target
        if not path.is_file() or path.stat().st_size != size:
            found.append(target)
    return found


def is_whole(directory: Path, lock: Lock | None, fingerprint: str) -> bool:
    """Return True if a run for the recipe with this fingerprint has nothing to do."""
    if lock is None or not lock.complete or lock.fingerprint != fingerprint:
        return False
    return (directory / MODEL_INDEX).is_file() and not missing_or_resized(directory, lock)


def damaged_files(directory: Path, lock: Lock, advance: Callable[[int], None] = lambda count: None) -> dict[str, str]:
    """Hash everything that the lock vouches for; return ``{target: what is wrong}``."""

    def examine(item: tuple[str, int, str]) -> tuple[str, str]:
        target, size, sha256 = item
        path = directory / target
        if not path.is_file():
            return target, "missing"
        if path.stat().st_size != size:
            return target, f"{path.stat().st_size} bytes instead of {size}"
        try:
            found = digests_of(path, git=False, advance=counted)["sha256"]
        except OSError as error:
            return target, f"cannot be read: {error.strerror}"
        return target, "" if found == sha256 else f"sha256 {found} instead of {sha256}"

    def counted(count: int) -> None:
        if stopped.is_set():
            raise Interrupted
        advance(count)

    stopped = threading.Event()
    with ThreadPoolExecutor(_HASHERS) as pool:
        try:
            return {target: problem for target, problem in pool.map(examine, expected_files(lock)) if problem}
        except BaseException:
            stopped.set()  # the pool waits for its threads, and a large file takes a minute
            raise
