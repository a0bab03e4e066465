"""Listings of a local folder or of a Hub repository, with random access to the files' bytes."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from port_kit.checkpoint.byte_sources import ByteSource, FileSource
from port_kit.download.http import HttpClient, Policy
from port_kit.download.hub import HubClient, HubFile, RangeSource
from port_kit.download.parts import FileSpec
from port_kit.errors import DownloadError, InspectError

_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
#: An interactive command: fewer attempts than a download.
POLICY = Policy(attempts=4)
_MOST_FILES = 100_000
_SKIPPED = {"__pycache__", "node_modules"}
_EITHER = "name an existing folder, or a repository of the Hub as organization/name"
_HINTS = {
    "hub_repo_missing": "check the name (there is no folder of that name here either); for a private repository log in "
    "with `hf auth login`",
    "hub_revision_missing": "name a branch, tag or commit that exists with --revision",
}


class FileListing(Protocol):
    """Files of a repository or folder.

    Attributes:
        name: name for messages.
        commit: commit of a repository.
        files: sizes by path.
        gate: the reason that the files cannot be read; empty if they can.
        broken: dangling links, pipes and devices.
    """

    name: str
    commit: str | None
    files: Mapping[str, int]
    gate: str
    broken: tuple[str, ...]

    def open(self, path: str) -> AbstractContextManager[ByteSource]:
        """Open a file for reading by offset."""


class LocalListing:
    """A folder. Hidden folders (``.git``, ``.cache``) are not looked into.

    Raises:
        InspectError: it holds more files than a model does.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.name, self.gate = root, str(root), ""
        self.commit: str | None = None
        paths = {path.relative_to(root).as_posix(): path for path in _walk(root)}
        sizes = {name: _size(path) for name, path in sorted(paths.items())}
        self.broken = tuple(name for name, size in sizes.items() if size is None)
        self.files: Mapping[str, int] = {name: size for name, size in sizes.items() if size is not None}

    def open(self, path: str) -> AbstractContextManager[ByteSource]:
        """See :class:`FileListing`."""
        return FileSource(self.root / path)


class HubListing:
    """A repository at one commit; no file of it is read before it is opened.

    Args:
        hub: the client.
        repo_id: ``organization/name``.
        revision: a branch, tag or commit.

    Raises:
        DownloadError: it does not exist, may not be seen, or the Hub cannot be reached.
    """

    def __init__(self, hub: HubClient, repo_id: str, revision: str) -> None:
        self.name, self._hub = repo_id, hub
        self.broken: tuple[str, ...] = ()
        with _inspection_hints():
            self.commit: str | None = hub.resolve(repo_id, revision)
            self._listed = {file.path: file for file in hub.tree(repo_id, str(self.commit))}
        self.files: Mapping[str, int] = {path: file.size for path, file in sorted(self._listed.items())}
        self.gate = self._ask_gate()

    def open(self, path: str) -> AbstractContextManager[ByteSource]:
        """See :class:`FileListing`; each read is one ranged request."""
        return nullcontext(RangeSource(self._hub, self._spec(path)))

    def _spec(self, path: str) -> FileSpec:
        file: HubFile = self._listed[path]
        return FileSpec(path, self.name, str(self.commit), path, file.size, file.digest)

    def _ask_gate(self) -> str:
        """Request a file, since listings of gated repositories are public. Return the gate, or an empty string."""
        try:
            for path in list(self.files)[:1]:
                self._hub.probe(self._spec(path))
        except DownloadError as error:
            if error.code != "hub_gated":
                raise
            return f"{error.message}: {error.hint}"
        return ""


@contextmanager
def open_listing(
    target: str, revision: str | None, endpoint: str | None, token: str | bool | None
) -> Iterator[FileListing]:
    """Open a local folder, or a Hub repository if there is no such folder.

    Raises:
        InspectError: ``inspect_target`` if it is neither.
        DownloadError: see :class:`HubListing`.
    """
    folder = Path(target).expanduser()
    if target and folder.is_dir():
        if revision is not None:
            raise InspectError(
                f"{target} is a folder here; --revision {revision} belongs to a repository", hint=_EITHER
            )
        yield LocalListing(folder)
        return
    if folder.is_file():
        raise InspectError(f"{target} is a file", hint=f"name its folder: {folder.parent}")
    if not _REPO_ID.fullmatch(target):
        raise InspectError(f"{target or 'an empty name'} is no folder and no repository id", hint=_EITHER)
    http = HttpClient(POLICY)
    try:
        yield HubListing(HubClient(http, endpoint=endpoint, token=token), target, revision or "main")
    finally:
        http.stop()


def _walk(root: Path) -> Iterator[Path]:
    count = 0
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in _SKIPPED)
        count += len(files)
        if count > _MOST_FILES:
            raise InspectError(f"{root} holds more than {_MOST_FILES} files", hint="name the model's own folder")
        yield from (Path(folder, name) for name in files)


def _size(path: Path) -> int | None:
    """Return the size of a regular file in bytes, or None. Reading a pipe would block."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


@contextmanager
def _inspection_hints() -> Iterator[None]:
    """Replace the client's hints about recipes by hints about the name that the user typed."""
    try:
        yield
    except DownloadError as error:
        if error.code not in _HINTS:
            raise
        raise DownloadError(error.message, code=error.code, hint=_HINTS[error.code], **error.details) from error
