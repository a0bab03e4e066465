"""Detection of silent failures: wrong pipeline selected, wrong files loaded, or remote code executed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from port_kit.escape import quoted
from port_kit.inspect.checkpoint_files import WeightSet, duplicate_tensors, group
from port_kit.inspect.classify import Classification
from port_kit.inspect.components import CONFIGS, INDEXES, index_path
from port_kit.inspect.documents import Documents
from port_kit.inspect.known_classes import omni
from port_kit.inspect.report import Component, Finding, WeightFile

_SAFETENSORS_INDEXES = ("diffusion_pytorch_model.safetensors.index.json", "model.safetensors.index.json")


def find_pitfalls(
    documents: Documents, classification: Classification, components: list[Component], files: dict[str, WeightFile]
) -> list[Finding]:
    """List the pitfalls of a model."""
    found = [
        *_folder_name(documents, classification),
        *_model_type(documents, classification),
        *_other_class(documents, components),
    ]
    return [
        *found,
        *several_sets(files.values()),
        *_loaded_twice(documents, files),
        *_own_code(documents),
        *_further_models(documents),
    ]


def _folder_name(documents: Documents, classification: Classification) -> Iterator[Finding]:
    """Check the folder's name: vLLM-Omni matches it with its keys if no other key selects a multi-stage pipeline."""
    config = documents.object("config.json")
    if classification.stage or config.get("model_type") or config.get("architecture"):
        return
    name = _basename(documents)
    keys = [key for key in omni().stages if _plain(key) in _plain(name)]
    if keys:
        key = max(keys, key=len)
        yield Finding(
            f"name {name}",
            f"contains {quoted(key)}: vLLM-Omni would serve its own {key} pipeline; use another folder name",
        )


def _basename(documents: Documents) -> str:
    name = documents.listing.name
    return name.rpartition("/")[2] if documents.listing.commit else Path(name).resolve().name


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _model_type(documents: Documents, classification: Classification) -> Iterator[Finding]:
    """Check for a root ``config.json``, which takes precedence over an index."""
    if (
        classification.stage
        and classification.stage == documents.object("config.json").get("model_type")
        and index_path(documents)
    ):
        yield Finding(
            "config.json",
            f"model_type {quoted(classification.stage)} selects vLLM-Omni's own pipeline, whatever the index says",
        )


def _other_class(documents: Documents, components: list[Component]) -> Iterator[Finding]:
    for part in components:
        for file, ((key, _), *_) in CONFIGS.items():
            path = f"{part.name}/{file}"
            said = documents.object(path).get(key)
            if key == "_class_name" and part.source != path and said and part.class_name and said != part.class_name:
                yield Finding(path, f"says {said}, {part.source} says {part.class_name}")


def _loaded_twice(documents: Documents, files: dict[str, WeightFile]) -> Iterator[Finding]:
    """Check for duplicates: without an index vLLM-Omni loads every safetensors file of a folder, variants included."""
    by_folder: dict[str, list[WeightSet]] = {}
    for item in group(files.values()):
        if item.suffix == ".safetensors":
            by_folder.setdefault(item.folder, []).append(item)
    for folder, sets in by_folder.items():
        indexes = [name for name in _SAFETENSORS_INDEXES if _in(folder, name) in documents.listing.files]
        if len(indexes) > 1:
            yield Finding(_in(folder, indexes[0]), f"lies beside {indexes[1]}: vLLM-Omni refuses two indexes")
        if not indexes:
            yield from duplicate_tensors(sets)


def several_sets(files: Iterable[WeightFile]) -> Iterator[Finding]:
    """Yield the pickles with several sets of tensors, with the one that is taken and the options for the others."""
    for file in files:
        if file.alternatives:
            others = " or ".join(f"--wrapper {wrapper}" for wrapper in file.alternatives)
            yield Finding(
                file.path,
                f"has several sets of tensors: {file.wrapper} is taken; port-kit new {others} takes another",
            )


def _own_code(documents: Documents) -> Iterator[Finding]:
    """Check for code in the repository, which runs only if it is trusted explicitly."""
    code = [path for path in documents.listing.files if path.endswith(".py")]
    if code:
        more = f" and {len(code) - 1} more" if len(code) > 1 else ""
        yield Finding(code[0] + more, "is code that comes with the weights; nothing of it was executed")


def _further_models(documents: Documents) -> Iterator[Finding]:
    """Check for subfolders with an index of their own, each of which is a model directory."""
    for path in documents.listing.files:
        folder, _, name = path.rpartition("/")
        if folder and name in INDEXES:
            yield Finding(path, f"makes {folder}/ a model directory of its own: fetch and inspect that folder")


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
