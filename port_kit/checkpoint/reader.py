"""The manifest of a checkpoint, local or remote: one file, a folder of files, or the files of an index.

Safetensors are preferred to torch checkpoints, and an index to the files beside it. Only headers are read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from port_kit.checkpoint.byte_sources import ByteSource, FileSource, StreamSource
from port_kit.checkpoint.containers import (
    LEFTOVERS,
    MAX_HEADER,
    PICKLE_SUFFIXES,
    SAFETENSORS_SUFFIX,
    looks_like_safetensors,
    looks_like_torch,
    refuse_dcp,
    refuse_foreign,
    refuse_foreign_name,
)
from port_kit.checkpoint.pickle_reader import read_tables
from port_kit.checkpoint.state_dicts import describe_places
from port_kit.errors import CheckpointError, PortKitError, RemapError
from port_kit.escape import quoted, reason_of
from port_kit.manifest import Manifest, Stamp, TensorSpec, invalid_manifest, parse_json, stamp

#: Formats that are read, the preferred one first, and the suffixes by which a folder's files are known.
SUFFIXES: dict[str, tuple[str, ...]] = {"safetensors": (SAFETENSORS_SUFFIX,), "torch": PICKLE_SUFFIXES}
INDEX_SUFFIX = ".index.json"
_FILES = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES, INDEX_SUFFIX)
_REMOTE = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?(?::(.+))?")
#: Read ahead of a remote header: most are smaller, so that one request is enough.
_READ_AHEAD = 1 << 18
_LARGEST_INDEX = 1 << 28
_SHOWN = 8


class CheckpointFiles(Protocol):
    """Files by path below a folder or a repository.

    Attributes:
        exact_offsets: reading a few bytes is cheap, so that offsets in pickles are read and not computed.
    """

    exact_offsets: bool

    def shown(self, path: str) -> str:
        """Return a path's name for messages."""

    def is_folder(self, path: str) -> bool:
        """Return True if a path is a folder."""

    def names(self, folder: str) -> list[str]:
        """Return the names of a folder's direct entries; names of folders end with a slash."""

    def open(self, path: str) -> AbstractContextManager[ByteSource]:
        """Open a file; raises FileNotFoundError if it is missing, OSError if it cannot be read."""


class LocalFiles(CheckpointFiles):
    """A folder on a disk."""

    exact_offsets = True

    def __init__(self, root: Path) -> None:
        self._root = root

    def shown(self, path: str) -> str:
        return str(self._root / path)

    def is_folder(self, path: str) -> bool:
        return (self._root / path).is_dir()

    def names(self, folder: str) -> list[str]:
        with os.scandir(self._root / folder) as entries:
            return sorted(entry.name + "/" * entry.is_dir() for entry in entries)

    def open(self, path: str) -> AbstractContextManager[ByteSource]:
        return FileSource(self._root / path)


class HubFiles(CheckpointFiles):
    """A repository, read through range requests."""

    exact_offsets = False

    def __init__(self, files: Any, root: str) -> None:
        self._files, self._root = files, root

    def shown(self, path: str) -> str:
        return f"{self._root}:{path}" if path else self._root

    def is_folder(self, path: str) -> bool:
        if not path or path.endswith(_FILES):  # a path with a checkpoint's suffix is a file
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


def read_local(path: Path, wrapper: str = "", *, formats: Sequence[str] = tuple(SUFFIXES)) -> Manifest:
    """Read a file or folder on a disk; see :meth:`port_kit.manifest.Manifest.from_checkpoint`."""
    root, name = (path, "") if path.is_dir() else (path.parent, path.name)
    try:
        return CheckpointReader(LocalFiles(root), wrapper, formats).read(name)
    except OSError as error:
        raise invalid_manifest(f"{path} cannot be read: {error.strerror or error}") from error


def looks_remote(text: str) -> bool:
    """Return True if a text can be ``owner/name[@revision][:path]``."""
    return _REMOTE.fullmatch(text) is not None and not text.startswith((".", "/"))


def read_remote(text: str, *, wrapper: str = "") -> Manifest:
    """Read a repository's headers by range requests: a file, an index, or a folder of them.

    Args:
        text: ``owner/name[@revision][:path]``; the path is a file or a folder, the root if it is missing.
        wrapper: of torch checkpoints, the keys above the tensors.

    Raises:
        RemapError: ``manifest_invalid`` if no readable file exists or the repository cannot be reached, and what
            :meth:`port_kit.manifest.Manifest.from_checkpoint` raises.
        CheckpointError: see there.
    """
    with open_remote(text) as (files, path):
        return CheckpointReader(files, wrapper).read(path)


@contextmanager
def open_remote(text: str) -> Iterator[tuple[HubFiles, str]]:
    """Open the repository of ``owner/name[@revision][:path]``; yield its files and the path.

    Raises:
        RemapError: ``manifest_invalid``; the repository cannot be read, also within the context.
    """
    match = _REMOTE.fullmatch(text)
    assert match is not None
    repo, revision, path = match.groups()
    import httpx
    from huggingface_hub import HfFileSystem

    try:
        yield HubFiles(HfFileSystem(), f"{repo}@{revision}" if revision else repo), (path or "").strip("/")
    except PortKitError:
        raise
    except (OSError, ValueError, httpx.HTTPError) as error:  # the hub's own errors are kinds of the first two
        raise RemapError(
            f"{text} cannot be read: {reason_of(error)}",
            code="manifest_invalid",
            hint="check the repository, the revision, the path, and the token for a gated one",
        ) from error


class CheckpointReader:
    """A reader of manifests.

    Args:
        files: location of the checkpoint.
        wrapper: of torch checkpoints, the keys above the tensors.
        formats: keys of :data:`SUFFIXES` that may be read.
    """

    def __init__(self, files: CheckpointFiles, wrapper: str, formats: Sequence[str] = tuple(SUFFIXES)) -> None:
        self._files, self._wrapper, self._formats = files, wrapper, formats

    def read(self, path: str) -> Manifest:
        """Read a file, an index, or a folder; an empty path selects the root.

        Raises:
            RemapError, CheckpointError: see :meth:`port_kit.manifest.Manifest.from_checkpoint`.
            OSError: a file cannot be read.
        """
        if self._files.is_folder(path):
            return self.read_folder(path)
        if path.endswith(INDEX_SUFFIX):
            return self.read_index(path)
        return self.read_file(path, path.rpartition("/")[2])

    def read_folder(self, folder: str) -> Manifest:
        shown, names = self._files.shown(folder), self._files.names(folder)
        base = f"{folder}/" if folder else ""
        for word in self._formats:
            if word == "torch":
                refuse_dcp(shown, names)
            suffixes = SUFFIXES[word]
            indexes = [name for name in names if name.endswith(tuple(suffix + INDEX_SUFFIX for suffix in suffixes))]
            if len(indexes) > 1:
                listed = ", ".join(indexes)
                raise invalid_manifest(f"{shown} holds {len(indexes)} indexes: {listed}", "name one of them")
            if indexes:
                return self.read_index(base + indexes[0])
            found = [name for name in names if name.endswith(suffixes)]
            if found:
                weights = [name for name in found if not name.startswith(LEFTOVERS)] or found
                left_out = [name for name in found if name not in weights]
                notes = [f"{name} is left out: trainers keep their own state under such names" for name in left_out]
                return join({name: self.read_file(base + name, name) for name in weights}, shown, notes=notes)
        for name in names:
            refuse_foreign_name(self._files.shown(base + name))
        listed = ", ".join(names[:_SHOWN]) or "nothing"
        raise invalid_manifest(
            f"{shown} holds no {' and no '.join(self._formats)} checkpoint; there is: {listed}",
            "name a file, a folder of them, or an index",
        )

    def read_index(self, path: str) -> Manifest:
        shown, folder = self._files.shown(path), path.rpartition("/")[0]
        base = f"{folder}/" if folder else ""
        with self._files.open(path) as source:
            weight_map = read_weight_map(source.read_at(0, min(source.size, _LARGEST_INDEX)), shown)
        parts: dict[str, Manifest] = {}
        missing: list[str] = []
        for file in sorted(set(weight_map.values())):
            try:
                parts[file] = self.read_file(base + file, file)
            except FileNotFoundError:
                missing.append(file)
        if missing:
            raise invalid_manifest(
                f"{shown} names {len(missing)} files that are missing: {', '.join(missing[:_SHOWN])}",
                "download them: a checkpoint is read whole",
                missing=missing,
            )
        for name, file in weight_map.items():
            if name not in parts[file]:
                others = " and ".join(other for other, part in parts.items() if name in part)
                raise invalid_manifest(
                    f"{shown} places {quoted(name)} in {file}; it is in {others or 'no file of the index'}",
                    "the index and its files are of different versions: download all of them again",
                )
        return join(parts, shown, weight_map)

    def read_file(self, path: str, file: str) -> Manifest:
        """Read one file; ``file`` is its path relative to the checkpoint's folder, for the specs of its tensors."""
        shown = self._files.shown(path)
        with self._files.open(path) as source:
            source.name = shown
            if self._format(source, path) == "safetensors":
                return _read_safetensors(source, file)
            return _read_torch(source, file, self._wrapper, exact_offsets=self._files.exact_offsets)

    def _format(self, source: ByteSource, path: str) -> str:
        if len(self._formats) == 1:
            return self._formats[0]
        for word in self._formats:
            if path.endswith(SUFFIXES[word]):
                return word
        refuse_foreign(source)
        if looks_like_safetensors(source):
            return "safetensors"
        if looks_like_torch(source):
            return "torch"
        raise invalid_manifest(f"{source.name} is no safetensors file and no torch checkpoint", "check the path")


def read_weight_map(text: str | bytes, origin: str) -> dict[str, str]:
    """Return ``{tensor: file}`` of an index; every file stands beside the index or below it.

    Raises:
        RemapError: ``manifest_invalid`` for anything else.
    """
    data = parse_json(text, origin)
    found = data.get("weight_map") if isinstance(data, Mapping) else None
    if not isinstance(found, Mapping) or not all(isinstance(file, str) and file for file in found.values()):
        raise invalid_manifest(f"{origin} has no weight_map of file names", "an index is {weight_map: {tensor: file}}")
    if not found:
        raise invalid_manifest(f"{origin} lists no tensors", "name one of the checkpoint's files instead")
    for file in set(found.values()):
        if ".." in PurePosixPath(file).parts or PurePosixPath(file).is_absolute():
            raise invalid_manifest(
                f"{origin} names the file {quoted(file)}", "files of an index stand beside it or below it"
            )
    return dict(found)


def _read_safetensors(source: ByteSource, file: str) -> Manifest:
    """Read a safetensors header."""
    if source.size:
        refuse_foreign(source)
    head = source.read_at(0, 8)
    size = int.from_bytes(head, "little") if len(head) == 8 else 0
    raw = source.read_at(8, size) if 2 <= size <= MAX_HEADER else b""
    header = parse_json(raw, f"the safetensors header of {source.name}") if raw and len(raw) == size else None
    if not isinstance(header, dict):
        raise invalid_manifest(f"{source.name} is not a whole safetensors file", "download it again")
    stamped: Stamp | None = stamp(source.descriptor) if isinstance(source, FileSource) else None
    manifest = Manifest.from_header(header, file=file, origin=source.name, start=8 + size, stamp=stamped)
    if source.size != 8 + size + manifest.nbytes:
        raise invalid_manifest(
            f"{source.name} has {source.size} bytes; its header needs {8 + size + manifest.nbytes}", "download it again"
        )
    return manifest


def _read_torch(source: ByteSource, file: str, wrapper: str, *, exact_offsets: bool) -> Manifest:
    """Read a torch checkpoint's tables. Tensors that are not selected are noted if a wrapper selects, else refused."""
    tables = read_tables(source, wrapper, exact_offsets=exact_offsets)
    if tables.elsewhere and not wrapper:
        wrappers = [place.path for place in tables.elsewhere if place.path and place.named]
        raise CheckpointError(
            f"{source.name} has {len(tables.tensors)} tensors at the top level and further ones under "
            f"{describe_places(tables.elsewhere)}",
            code="pickle_wrapper",
            hint=f"name the one that you want: {' or '.join(f'--wrapper {path}' for path in (*wrappers[:1], '.'))} "
            "(. is the top level)",
            wrappers=wrappers,
        )
    note = f"{source.name}: tensors under {describe_places(tables.elsewhere)} are left out"
    entries = {name: TensorSpec(tuple(entry.shape), entry.dtype, file) for name, entry in tables.tensors.items()}
    return Manifest(entries, origin=source.name, notes=[note] if tables.elsewhere else ())


def join(
    parts: Mapping[str, Manifest],
    origin: str,
    weight_map: Mapping[str, str] | None = None,
    *,
    notes: Iterable[str] = (),
) -> Manifest:
    """Return the manifest of a checkpoint from those of its files, of which an index may select tensors.

    Raises:
        RemapError: ``manifest_invalid`` for a name in two files, ``remap_mixed`` for files of different naming.
    """
    entries: dict[str, TensorSpec] = {}
    places: dict[str, int] = {}
    stamps: dict[str, Stamp] = {}
    all_notes = list(notes)
    for file, part in parts.items():
        selected = {name: spec for name, spec in part.items() if weight_map is None or weight_map.get(name) == file}
        left_out = [name for name in part if name not in selected]
        twice = entries.keys() & selected.keys()
        if twice:
            name = next(name for name in part if name in twice)
            raise invalid_manifest(
                f"{quoted(name)} is in {entries[name].file} and in {file}",
                "name one of the files, or an index that says which copy counts",
            )
        entries.update(selected)
        places.update((name, place) for name, place in part.places.items() if name in selected)
        stamps.update(part.stamps)
        all_notes += part.notes
        if left_out:
            shown = ", ".join(left_out[:_SHOWN]) + (", ..." if len(left_out) > _SHOWN else "")
            all_notes.append(
                f"{file}: {len(left_out)} tensors are left out, as {origin} does not place them there: {shown}"
            )
    naming = _common_naming({file: part.naming for file, part in parts.items()}, origin)
    return Manifest(entries, origin=origin, places=places, stamps=stamps, naming=naming, notes=all_notes)


def _common_naming(files: Mapping[str, str], origin: str) -> str:
    """Return the naming of a checkpoint from that of its files, empty unless all of them record it."""
    namings = set(files.values())
    converted = next((file for file, naming in files.items() if naming.startswith("converted")), "")
    if converted and len(namings) > 1:
        other = next(file for file, naming in files.items() if naming != files[converted])
        raise RemapError(
            f"{origin}: {converted} is {files[converted]}, {other} {files[other] or 'records none'}",
            code="remap_mixed",
            hint="keep files with original and with converted names in different folders",
        )
    return namings.pop() if len(namings) == 1 else ""
