"""Make the fetched files a model directory: configurations, lock, and ``model_index.json`` as the last of all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from port_kit.download.lock import MODEL_INDEX, Lock, drop_journal
from port_kit.download.paths import foreign_target, require_place
from port_kit.download.recipe import Recipe, plain
from port_kit.download.state import is_behind_link, remove_file
from port_kit.errors import DownloadError
from port_kit.files import read_json, sync_folder, write_atomically

_PICKLE_INDEX = re.compile(r"(\.(bin|pt|pth|ckpt))?\.index\.json$")


def _configs(recipe: Recipe) -> dict[str, str]:
    """Return the files that a recipe contains itself, ``{target: content}``, without ``model_index.json``."""
    return {f"{folder}/config.json": _text(content) for folder, content in sorted(recipe.configs.items())}


def plan_written(directory: Path, recipe: Recipe, known: Lock) -> dict[str, dict[str, Any]]:
    """Return the lock's entries of the files that the recipe contains itself.

    Raises:
        DownloadError: ``target_foreign`` if one of them is there, was not written by the kit, and is another.
    """
    contents = {**_configs(recipe), MODEL_INDEX: _text(recipe.model_index)}
    return {target: _entry(directory, target, text, known) for target, text in contents.items()}


def _entry(directory: Path, target: str, text: str, known: Lock) -> dict[str, Any]:
    path, ours = directory / target, known.written.get(target)
    require_place(path)
    created = ours is not None and not ours.get("adopted") and not is_behind_link(directory, target)
    adopted = path.exists() and not created
    if adopted and not _holds(path, text):
        raise foreign_target(
            f"{path} was not written by port-kit, or lies behind a linked folder, and is not what the recipe contains"
        )
    return {"size": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest(), "adopted": adopted}


def invalidate_index(directory: Path) -> None:
    """Remove ``model_index.json``: the directory is incomplete from now on."""
    if remove_file(directory, MODEL_INDEX):
        sync_folder(directory)


def assemble(directory: Path, recipe: Recipe, lock: Lock) -> None:
    """Write the recipe's own files, complete the lock, and write ``model_index.json`` last.

    Raises:
        DownloadError: ``model_incomplete`` if an index names a shard that is not there.
    """
    contents, index = _configs(recipe), _text(recipe.model_index)
    for target, text in _converted_indexes(directory, lock).items():
        contents[target] = text
        lock.written[target] = _entry(directory, target, text, lock)
    for target, text in contents.items():
        if not _holds(directory / target, text):
            write_atomically(directory / target, text)
    lock.complete = True
    lock.save(directory)
    drop_journal(directory)
    write_atomically(directory / MODEL_INDEX, index)


def _converted_indexes(directory: Path, lock: Lock) -> dict[str, str]:
    """Check every ``*.index.json`` of a component; return those that name converted shards, rewritten.

    Every shard must be there: a loader would fail on it much later. ``pytorch_model.bin.index.json`` becomes
    ``pytorch_model.safetensors.index.json`` beside it, with the names that the shards have in the model directory.
    """
    places = {(item.spec.repo_id, item.spec.path): item.spec for item in lock.files.values() if item.spec.convert}
    rewritten = {}
    for target, item in lock.files.items():
        if not target.endswith(".index.json"):
            continue
        index = read_json(directory / target)
        if not isinstance(index, Mapping) or "weight_map" not in index:
            continue
        folder, shards = PurePosixPath(target).parent, index["weight_map"]
        if not isinstance(shards, Mapping) or not all(isinstance(shard, str) for shard in shards.values()):
            raise _incomplete(f"{target} has a weight_map that does not name a file for each tensor")
        renamed, missing = {}, set()
        for shard in dict.fromkeys(shards.values()):
            source = (PurePosixPath(item.spec.path).parent / shard).as_posix()
            spec = places.get((item.spec.repo_id, source))
            if spec is not None and PurePosixPath(spec.target).is_relative_to(folder):
                renamed[shard] = PurePosixPath(spec.target).relative_to(folder).as_posix()
            elif shard.startswith("/") or ".." in shard.split("/") or not (directory / folder / shard).is_file():
                missing.add(shard)
        if missing:
            raise _incomplete(f"{target} names {', '.join(sorted(missing)[:5])}, which the recipe does not include")
        if renamed:
            name = _PICKLE_INDEX.sub("", target) + ".safetensors.index.json"
            shards = {tensor: renamed.get(shard, shard) for tensor, shard in shards.items()}
            rewritten[name] = _text({**index, "weight_map": shards})
    return rewritten


def _incomplete(message: str) -> DownloadError:
    return DownloadError(message, code="model_incomplete", hint="add these files to the recipe's patterns")


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(dict(content), indent=2, default=plain, allow_nan=False) + "\n"


def _holds(path: Path, text: str) -> bool:
    content = text.encode()
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content
