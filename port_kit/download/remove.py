"""Delete exactly the files that a download created in a model directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from port_kit.download.assemble import invalidate_index
from port_kit.download.lock import LOCK_NAME, MODEL_INDEX, Lock, drop_journal, read_lock
from port_kit.download.parts import remove_stale
from port_kit.download.state import directory_lock, remove_empty_folders, remove_file, state_path
from port_kit.errors import DownloadError
from port_kit.files import os_errors_as


@dataclass(frozen=True)
class RemoveReport:
    """The files that were removed and left, relative to the directory; ``gone`` if the folder was removed too."""

    directory: Path
    removed: tuple[str, ...]
    left: tuple[str, ...]
    gone: bool


def remove(directory: str | Path, notice: Callable[[str], None] = lambda text: None) -> RemoveReport:
    """Delete the files that the kit created by ``port.lock``, its state, and folders that are empty then.

    Adopted files, and files behind a linked folder, are left.

    Args:
        directory: the model directory.
        notice: called if another process works on the directory, whose end is waited for.

    Raises:
        DownloadError: ``model_incomplete`` if the directory has no ``port.lock``.
    """
    directory = Path(directory).absolute()
    _locked(directory)
    with directory_lock(directory, notice) as exclusive, os_errors_as(directory):
        lock = _locked(directory)  # another process may have worked on it until now
        invalidate_index(directory)
        targets = [*sorted(lock.created()), LOCK_NAME]
        removed = tuple(target for target in targets if target == MODEL_INDEX or remove_file(directory, target))
        remove_empty_folders(directory, removed)
        remove_stale(directory, set(), exclusive=exclusive)
        drop_journal(directory)
        (state_path(directory) / "lock").unlink()
        if not any(state_path(directory).iterdir()):
            state_path(directory).rmdir()
    left = tuple(
        path.relative_to(directory).as_posix()
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    )
    if not any(directory.iterdir()) and not directory.is_symlink():
        directory.rmdir()
    return RemoveReport(directory, removed, left, gone=not directory.exists())


def _locked(directory: Path) -> Lock:
    lock = read_lock(directory)
    if lock is None:
        raise DownloadError(
            f"{directory} has no {LOCK_NAME}: it is not known what was put there",
            code="model_incomplete",
            hint="check the path",
        )
    return lock
