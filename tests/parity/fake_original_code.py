"""The fake original code as files and as an entry of a lock."""

from __future__ import annotations

from pathlib import Path

from port_kit.download import GitCode
from port_kit.download.gitcode import fetch_code
from port_kit.download.lock import read_lock

FAKE_ORIGINAL = Path(__file__).parent / "fake_original"


def fake_original_files() -> dict[str, bytes]:
    """Return the fake's files by their path in its repository."""
    return {path.relative_to(FAKE_ORIGINAL).as_posix(): path.read_bytes() for path in FAKE_ORIGINAL.rglob("*.py")}


def with_code(directory: Path, code: GitCode, commit: str) -> Path:
    """Fetch one commit and record it in the lock, like ``--with-reference``, without the entry in site-packages."""
    fetch_code(code, commit)
    lock = read_lock(directory)
    assert lock is not None
    lock.code[code.name] = {"url": code.url, "commit": commit}
    lock.save(directory)
    return directory
