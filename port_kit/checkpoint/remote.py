"""Manifests of remote checkpoints, from headers alone, before anything is downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from port_kit.checkpoint.byte_sources import ByteSource, StreamSource
from port_kit.checkpoint.reader import INDEX_SUFFIX, SUFFIXES, CheckpointFiles, CheckpointReader
from port_kit.errors import PortKitError, RemapError
from port_kit.manifest import Manifest

_REMOTE = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?(?::(.+))?")
#: Read ahead of a header: most are smaller, so that one request is enough.
_READ_AHEAD = 1 << 18
_FILES = (*(suffix for suffixes in SUFFIXES.values() for suffix in suffixes), INDEX_SUFFIX)


def looks_remote(text: str) -> bool:
    """Return True if a text can be ``owner/name[@revision][:path]``."""
    return _REMOTE.fullmatch(text) is not None and not text.startswith((".", "/"))


def read_remote(text: str, *, wrapper: str = "") -> Manifest:
    """Read a repository's headers by range requests: a file, an index, or a folder of them.

    Args:
        text: ``owner/name[@revision][:path]``; the path is a file or a folder, the root if it is missing.
        wrapper: of torch checkpoints, the keys above the tensors.

    Raises:
        RemapError: ``manifest_invalid`` if nothing readable is there or the repository cannot be reached, and what
            :meth:`port_kit.manifest.Manifest.from_checkpoint` raises.
        CheckpointError: see there.
    """
    match = _REMOTE.fullmatch(text)
    assert match is not None
    repo, revision, path = match.groups()
    import httpx
    from huggingface_hub import HfFileSystem

    try:
        files = HubFiles(HfFileSystem(), f"{repo}@{revision}" if revision else repo)
        return CheckpointReader(files, wrapper).read((path or "").strip("/"))
    except PortKitError:
        raise
    except (OSError, ValueError, httpx.HTTPError) as error:  # the hub's own errors are kinds of the first two
        raise RemapError(
            f"{text} cannot be read: {error}",
            code="manifest_invalid",
            hint="check the repository, the revision, the path, and the token for a gated one",
        ) from error


class HubFiles(CheckpointFiles):
    """A repository, read through range requests."""

    exact_offsets = False

    def __init__(self, files: Any, root: str) -> None:
        self._files, self._root = files, root

    def shown(self, path: str) -> str:
        return f"{self._root}:{path}" if path else self._root

    def is_folder(self, path: str) -> bool:
        if not path or path.endswith(_FILES):  # what has a checkpoint's suffix is a file
            return not path
        full = f"{self._root}/{path}"
        return all(entry["name"] != full for entry in self._files.ls(full, detail=True))

    def names(self, folder: str) -> list[str]:
        base = f"{self._root}/{folder}".rstrip("/") + "/"
        listed = self._files.ls(base.rstrip("/"), detail=True)
        names = {entry["name"].removeprefix(base): entry["type"] for entry in listed if entry["name"].startswith(base)}
        return sorted(name + "/" * (kind == "directory") for name, kind in names.items() if "/" not in name)

    @contextmanager
    def open(self, path: str) -> Iterator[ByteSource]:
        with self._files.open(f"{self._root}/{path}", "rb", block_size=_READ_AHEAD) as stream:
            yield StreamSource(stream)
