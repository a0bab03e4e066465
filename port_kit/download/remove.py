"""Take away what a download put there, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from port_kit.download.assemble import take_down
from port_kit.download.files import STATE_FOLDER, directory_lock, explained, remove_empty_folders
from port_kit.download.lock import LOCK_NAME, Lock, read_lock
from port_kit.download.plan import MODEL_INDEX
from port_kit.errors import DownloadError


@dataclass(frozen=True)
class Removal:
    """What was removed and what was left, relative to the directory; ``gone`` where the folder itself went too."""

    directory: Path
    removed: tuple[str, ...]
    left: tuple[str, ...]
    gone: bool


def remove(directory: str | Path, notice: Callable[[str], None] = lambda text: None) -> Removal:
    """Delete the files that ``port.lock`` names, the kit's state, and folders that are empty then.

    Args:
        directory: the model directory.
        notice: told where another process works on the directory, whose end is waited for.

    Raises:
        DownloadError: ``model_incomplete`` where the directory has no ``port.lock``.
    """
    directory = Path(directory).absolute()
    _locked(directory)
    with directory_lock(directory, notice), explained(directory):
        lock = _locked(directory)  # another process may have worked on it until now
        ours = [*lock.files, *lock.written, LOCK_NAME, MODEL_INDEX]
        present = tuple(dict.fromkeys(target for target in ours if (directory / target).is_file()))
        take_down(directory)
        for target in present:
            (directory / target).unlink(missing_ok=True)
        remove_empty_folders(directory, {Path(target).parent for target in present})
        shutil.rmtree(directory / STATE_FOLDER)
    left = tuple(path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if not path.is_dir())
    if not any(directory.iterdir()) and not directory.is_symlink():
        directory.rmdir()
    return Removal(directory, present, left, gone=not directory.exists())


def _locked(directory: Path) -> Lock:
    lock = read_lock(directory)
    if lock is None:
        raise DownloadError(
            f"{directory} has no {LOCK_NAME}: it is not known what was put there",
            code="model_incomplete",
            hint="check the path",
        )
    return lock
