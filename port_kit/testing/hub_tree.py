"""Listings of a loopback Hub's repositories, and its repositories read from a folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from port_kit.errors import DownloadError

Content = bytes | Path
_LFS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".model")
_PIECE = 1 << 20


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit with the hashes that the Hub states."""

    path: str
    content: Content
    size: int
    git_sha1: str
    sha256: str | None

    @property
    def etag(self) -> str:
        """The ETag: the LFS hash, or the git blob hash of small files."""
        return self.sha256 or self.git_sha1


def store(path: str, content: Content) -> StoredFile:
    """Hash a file as the Hub does."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    git_sha1, sha256 = hashlib.sha1(f"blob {size}\0".encode()), hashlib.sha256()
    is_lfs = path.endswith(_LFS_SUFFIXES) or size > 10 << 20
    for piece in _pieces(content):
        (sha256 if is_lfs else git_sha1).update(piece)
    return StoredFile(path, content, size, git_sha1.hexdigest(), sha256.hexdigest() if is_lfs else None)


def _pieces(content: Content) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as stream:
        while piece := stream.read(_PIECE):
            yield piece


def list_tree(
    files: Mapping[str, StoredFile], xet: Mapping[str, str], folder: str = "", *, recursive: bool
) -> list[dict[str, Any]]:
    """Return the entries of the Hub's tree API below a folder; folders are entries if the list is not recursive."""
    base = f"{folder}/" if folder else ""
    below = [file for path, file in files.items() if path.startswith(base)]
    if recursive:
        return [_file_entry(file, xet) for file in below]
    direct = [_file_entry(file, xet) for file in below if "/" not in file.path.removeprefix(base)]
    names = {file.path.removeprefix(base).partition("/")[0] for file in below if "/" in file.path.removeprefix(base)}
    return [*(_folder_entry(base + name) for name in sorted(names)), *direct]


def paths_info(files: Mapping[str, StoredFile], xet: Mapping[str, str], paths: Iterable[str]) -> list[dict[str, Any]]:
    """Return the entries of the paths that exist, files and folders."""
    found = []
    for path in paths:
        if path in files:
            found.append(_file_entry(files[path], xet))
        elif any(other.startswith(f"{path}/") for other in files):
            found.append(_folder_entry(path))
    return found


def _file_entry(file: StoredFile, xet: Mapping[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": file.git_sha1, "size": file.size, "path": file.path}
    if file.sha256:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    if file.path in xet:
        entry["xetHash"] = xet[file.path]
    return entry


def _folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}


def read_repositories(folder: Path, name: str | None = None) -> dict[str, dict[str, Path]]:
    """Return the repositories of a folder: ``{repo_id: {path: file}}``. Hidden files and folders are left out.

    Args:
        folder: holds one repository per subfolder ``ORG/NAME``.
        name: ``ORG/NAME``, if the folder itself is the repository.

    Raises:
        DownloadError: ``hub_folder``; the folder has no repository, or files that belong to none.
    """
    if not folder.is_dir():
        raise DownloadError(f"{folder} is not a folder", code="hub_folder", hint="name a folder with files to serve")
    if name is not None:
        found = {name: dict(_files(folder))}
    else:
        stray = [path.relative_to(folder).as_posix() for path in _stray(folder)]
        if stray:
            raise DownloadError(
                f"{folder} has files that are in no ORG/NAME folder: {', '.join(stray[:5])}",
                code="hub_folder",
                hint=f"to serve the folder as one repository: port-kit hub {folder} --repository ORG/NAME",
            )
        repositories = (path for path in _visible(folder) for path in _visible(path))
        found = {path.relative_to(folder).as_posix(): dict(_files(path)) for path in repositories}
    empty = [repo_id for repo_id, files in found.items() if not files]
    if empty or not found:
        problem = f"{', '.join(empty)} has no files" if empty else "it has no folder ORG/NAME"
        raise DownloadError(f"{folder} cannot be served: {problem}", code="hub_folder", hint="add files, or remove it")
    return found


def _visible(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


def _stray(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of its direct subfolders."""
    for path in _visible(folder):
        if path.is_file():
            yield path
        else:
            yield from (below for below in _visible(path) if below.is_file())


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield paths in the repository with their files; links are followed, as caches of downloads consist of them."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(folder).as_posix(), path
