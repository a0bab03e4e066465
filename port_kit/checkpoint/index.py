"""The index of a checkpoint of several files: which tensor counts in which file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from port_kit.manifest import Manifest, TensorSpec, invalid_manifest, parse_json

INDEX_SUFFIX = ".index.json"
_SHOWN = 4


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
            raise invalid_manifest(f"{origin} names the file {file!r}", "files of an index stand beside it or below it")
    return dict(found)


def select(weight_map: Mapping[str, str], parts: Mapping[str, Manifest], origin: str) -> list[tuple[str, Manifest]]:
    """Return the files' manifests with the tensors that the index assigns to each; the rest is noted.

    Args:
        weight_map: of the index.
        parts: the manifest of each file that it names.
        origin: what messages call the index.

    Raises:
        RemapError: ``manifest_invalid`` for a tensor that is not in its file.
    """
    for name, file in weight_map.items():
        if name not in parts[file]:
            others = [other for other, part in parts.items() if name in part]
            raise invalid_manifest(
                f"{origin} places {name!r} in {file}; it is in {' and '.join(others) or 'no file of the index'}",
                "the index and its files are of different versions: download all of them again",
            )
    return [(file, _selected(weight_map, file, part, origin)) for file, part in parts.items()]


def _selected(weight_map: Mapping[str, str], file: str, part: Manifest, origin: str) -> Manifest:
    entries: dict[str, TensorSpec] = {}
    left_out: list[str] = []
    for name, spec in part.items():
        if weight_map.get(name) == file:
            entries[name] = spec
        else:
            left_out.append(name)
    if not left_out:
        return part
    shown = ", ".join(left_out[:_SHOWN]) + (", ..." if len(left_out) > _SHOWN else "")
    note = f"{file}: {len(left_out)} tensors are left out, as {origin} does not place them there: {shown}"
    return Manifest(
        entries,
        origin=part.origin,
        places={name: part.places[name] for name in entries if name in part.places},
        stamps=part.stamps,
        naming=part.naming,
        notes=(*part.notes, note),
    )
