"""Manifests of remote checkpoints, from headers alone, before anything is downloaded."""

from __future__ import annotations

import re
import struct
from typing import Any, BinaryIO

from port_kit.errors import RemapError
from port_kit.manifest import (
    MAX_HEADER,
    PICKLE_SUFFIXES,
    Manifest,
    TensorSpec,
    common_naming,
    parse_json,
    read_weight_map,
)

_REMOTE = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?(?::(.+))?")
#: Read ahead of a header: most are smaller, so that one request is enough.
_READ_AHEAD = 1 << 18


def looks_remote(text: str) -> bool:
    """Whether a text can be ``owner/name[@revision][:path]``."""
    return _REMOTE.fullmatch(text) is not None and not text.startswith((".", "/"))


def read_remote(text: str, *, wrapper: str = "") -> Manifest:
    """Read a repository's headers by range requests: a safetensors file, an index or a folder of them, or a pickle.

    Args:
        text: ``owner/name[@revision][:path]``; the path is a file or a folder, the root where it is missing.
        wrapper: for a pickle checkpoint, the keys above its tensors.

    Raises:
        RemapError: ``manifest_invalid`` where nothing readable is there or the repository cannot be reached.
    """
    match = _REMOTE.fullmatch(text)
    assert match is not None
    repo, revision, path = match.groups()
    import httpx
    from huggingface_hub import HfFileSystem

    try:
        return _Remote(HfFileSystem(), f"{repo}@{revision}" if revision else repo, text).read(path or "", wrapper)
    except (OSError, ValueError, httpx.HTTPError) as error:  # the hub's own errors are kinds of the first two
        raise RemapError(
            f"{text} cannot be read: {error}",
            code="manifest_invalid",
            hint="check the repository, the revision, the path, and the token for a gated one",
        ) from error


class _Remote:
    """One repository, read through range requests."""

    def __init__(self, files: Any, root: str, label: str) -> None:
        self.files = files
        self.root = root
        self.label = label

    def read(self, path: str, wrapper: str) -> Manifest:
        """Read a file or a folder of the repository."""
        if path.endswith(".index.json"):
            return self._index(path)
        if path.endswith(".safetensors"):
            return self._safetensors([path])
        if path.endswith(PICKLE_SUFFIXES):
            return self._pickle(path, wrapper)
        folder = f"{self.root}/{path}".rstrip("/")
        listed = [entry["name"] for entry in self.files.ls(folder, detail=True)]
        here = [name for name in listed if name.startswith(f"{folder}/") and "/" not in name[len(folder) + 1 :]]
        names = [name.removeprefix(f"{self.root}/") for name in here]
        indexes = [name for name in names if name.endswith(".safetensors.index.json")]
        tensors = sorted(name for name in names if name.endswith(".safetensors"))
        if len(indexes) == 1:
            return self._index(indexes[0])
        if tensors:
            return self._safetensors(tensors)
        raise RemapError(
            f"{self.label} holds no safetensors file at its top",
            code="manifest_invalid",
            hint=f"name a file or folder: {self.root}:PATH; there are {', '.join(names[:8]) or 'none'}",
        )

    def _index(self, path: str) -> Manifest:
        folder = path.rpartition("/")[0]
        weight_map = read_weight_map(self.files.read_text(f"{self.root}/{path}"), path)
        files = sorted(set(weight_map.values()))
        manifest = self._safetensors([f"{folder}/{file}".lstrip("/") for file in files])
        absent = [name for name in weight_map if name not in manifest]
        if absent or not files:
            raise RemapError(
                f"{path} names {len(absent)} tensors that its files do not have, such as {absent[:1]}",
                code="manifest_invalid",
                hint="the repository's index and files are of different versions",
            )
        return manifest

    def _safetensors(self, paths: list[str]) -> Manifest:
        entries: dict[str, TensorSpec] = {}
        namings: dict[str, str] = {}
        for path in paths:
            with self.files.open(f"{self.root}/{path}", "rb", block_size=_READ_AHEAD) as stream:
                header = _header(stream, path)
            part = Manifest.from_header(header, file=path, origin=path)
            namings[path] = part.naming
            for name, spec in part.items():
                if name in entries:
                    raise RemapError(
                        f"{name!r} stands in {entries[name].file} and in {path}",
                        code="manifest_invalid",
                        hint="name one of the files",
                    )
                entries[name] = spec
        return Manifest(entries, origin=self.label, naming=common_naming(namings, self.label))

    def _pickle(self, path: str, wrapper: str) -> Manifest:
        from port_kit.checkpoint.pickle_reader import read_tables

        with self.files.open(f"{self.root}/{path}", "rb", block_size=_READ_AHEAD) as stream:
            tables = read_tables(stream, wrapper, exact_offsets=False)
        return Manifest(
            {name: TensorSpec(tuple(entry.shape), entry.dtype, path) for name, entry in tables.tensors.items()},
            origin=self.label,
        )


def _header(stream: BinaryIO, path: str) -> dict[str, Any]:
    start = stream.read(8)
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= size <= MAX_HEADER:
        raise RemapError(f"{path} is not a safetensors file", code="manifest_invalid", hint="check the path")
    header = parse_json(stream.read(size), f"the safetensors header of {path}")
    if not isinstance(header, dict):
        raise RemapError(f"{path} is not a safetensors file", code="manifest_invalid", hint="check the path")
    return header
