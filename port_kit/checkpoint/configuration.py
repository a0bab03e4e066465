"""The ``config.json`` that lies beside a checkpoint, on a disk or on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from port_kit.checkpoint.reader import INDEX_SUFFIX, CheckpointFiles, LocalFiles, looks_remote, open_remote
from port_kit.manifest import invalid_manifest, parse_json

CONFIG_NAME = "config.json"
_LARGEST = 1 << 24


def config_beside(text: str) -> tuple[str, Mapping[str, Any]] | None:
    """Return the name and the content of the configuration beside a checkpoint, or None if there is none.

    Args:
        text: a checkpoint's file or folder, or ``owner/name[@revision][:path]``. A manifest has no configuration.

    Raises:
        RemapError: ``manifest_invalid``; the file is not a JSON object, or cannot be read.
    """
    path = Path(text)
    if path.suffix == ".json" and not path.name.endswith(INDEX_SUFFIX):
        return None
    if path.exists():
        return _read(LocalFiles(path if path.is_dir() else path.parent), "")
    if not looks_remote(text):
        return None
    with open_remote(text) as (files, inside):
        folder = inside if files.is_folder(inside) else inside.rpartition("/")[0]
        return _read(files, folder)


def read_config(path: Path) -> Mapping[str, Any]:
    """Read a configuration from its file, or from the folder that it is in.

    Raises:
        RemapError: ``manifest_invalid``; there is none, or it is not a JSON object.
    """
    name = "" if path.is_dir() else path.name
    found = _read(LocalFiles(path if path.is_dir() else path.parent), "", name or CONFIG_NAME)
    if found is None:
        raise invalid_manifest(f"{path} is not a configuration", f"name a {CONFIG_NAME}, or the folder with it")
    return found[1]


def changed_values(full: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return ``{dotted key: (value, value at full size)}`` of the keys of both configurations whose values differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in full.keys() & other.keys():
        mine, theirs = other[key], full[key]
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found |= changed_values(theirs, mine, f"{prefix}{key}.")
        elif _plain(mine) != _plain(theirs):
            found[f"{prefix}{key}"] = (mine, theirs)
    return dict(sorted(found.items()))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read(files: CheckpointFiles, folder: str, name: str = CONFIG_NAME) -> tuple[str, Mapping[str, Any]] | None:
    path = f"{folder}/{name}" if folder else name
    try:
        with files.open(path) as source:
            data = parse_json(source.read_at(0, min(source.size, _LARGEST)), files.shown(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise invalid_manifest(f"{files.shown(path)} cannot be read: {error.strerror or error}") from error
    if not isinstance(data, Mapping):
        raise invalid_manifest(f"{files.shown(path)} is not a JSON object", "check the file")
    return files.shown(path), data
