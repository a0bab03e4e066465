"""Make the fetched files a model directory: configurations, lock, and ``model_index.json`` as the last of all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from port_kit.download.files import read_json, require_place, sync_folder, write_atomically
from port_kit.download.lock import Lock, drop_journal
from port_kit.download.plan import MODEL_INDEX
from port_kit.download.recipe import Recipe, plain
from port_kit.errors import DownloadError


def texts_of(recipe: Recipe) -> dict[str, str]:
    """Return the files that a recipe contains itself, ``{target: content}``, without ``model_index.json``."""
    return {f"{folder}/config.json": _text(content) for folder, content in sorted(recipe.configs.items())}


def check_owned(directory: Path, recipe: Recipe, known: Lock | None) -> None:
    """Refuse to overwrite files that somebody else wrote.

    Raises:
        DownloadError: ``target_foreign``.
    """
    ours = known.written if known else {}
    contents = {**texts_of(recipe), MODEL_INDEX: _text(recipe.model_index)}
    for target, text in contents.items():
        path = directory / target
        require_place(path)
        if path.exists() and target not in ours and known is None and not _holds(path, text):
            raise DownloadError(
                f"{path} was not written by port-kit",
                code="target_foreign",
                hint="move it away, or choose another --output-dir",
            )


def take_down(directory: Path) -> None:
    """Remove ``model_index.json``: from now on the directory is not whole."""
    path = directory / MODEL_INDEX
    if path.exists():
        path.unlink()
        sync_folder(directory)


def assemble(directory: Path, recipe: Recipe, lock: Lock) -> None:
    """Write what the recipe contains, complete the lock, and say that the model is whole.

    Raises:
        DownloadError: ``model_incomplete`` where an index names a shard that is not there.
    """
    contents = texts_of(recipe)
    for target, text in contents.items():
        if not _holds(directory / target, text):
            write_atomically(directory / target, text)
    check_indexes(directory, lock)
    index = _text(recipe.model_index)
    lock.written = {
        target: {"size": len(text.encode()), "sha256": _sha256(text)}
        for target, text in {**contents, MODEL_INDEX: index}.items()
    }
    lock.complete = True
    lock.save(directory)
    drop_journal(directory)
    write_atomically(directory / MODEL_INDEX, index)


def check_indexes(directory: Path, lock: Lock) -> None:
    """Every shard that a ``*.index.json`` of a component names must be there: a loader would fail on it much later."""
    for target in lock.files:
        if not target.endswith(".index.json"):
            continue
        index = read_json(directory / target)
        shards = set(index["weight_map"].values()) if isinstance(index, Mapping) and "weight_map" in index else set()
        missing = sorted(shard for shard in shards if not (directory / target).with_name(str(shard)).is_file())
        if missing:
            raise DownloadError(
                f"{target} names {', '.join(missing[:5])}, which the recipe does not bring",
                code="model_incomplete",
                hint="add these files to the recipe's patterns",
            )


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(dict(content), indent=2, default=plain, allow_nan=False) + "\n"


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
