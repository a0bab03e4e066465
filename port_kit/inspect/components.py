"""Components of a model: entries of ``model_index.json``, folders with a ``config.json``, and other checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from port_kit.inspect.checkpoint_files import WeightSet, choose, group
from port_kit.inspect.documents import Documents
from port_kit.inspect.known_classes import library_has
from port_kit.inspect.recognition import recognize
from port_kit.inspect.report import Component, WeightFile
from port_kit.port import DENOISERS

INDEXES = ("model_index.json", "modular_model_index.json")
#: Files that name a folder's class, and how: ``{file: (key, library)}``.
CONFIGS = {
    "config.json": (("_class_name", "diffusers"), ("architectures", "transformers")),
    "scheduler_config.json": (("_class_name", "diffusers"),),
    "tokenizer_config.json": (("tokenizer_class", "transformers"),),
}
#: Endings of classes that have no weights.
_WEIGHTLESS = ("Tokenizer", "Processor", "FeatureExtractor", "Scheduler", "Config", "Guidance", "Guider")


@dataclass(frozen=True)
class Named:
    """A class and the file that names it; ``elsewhere`` is its repository if that is another one."""

    library: str
    class_name: str
    source: str
    elsewhere: str = ""


def has_weights(class_name: str) -> bool:
    """Return True if a class has weights. Tokenizers, processors and schedulers do not."""
    return not class_name.removesuffix("Fast").endswith(_WEIGHTLESS)


def is_denoiser(name: str) -> bool:
    """Return True for a component that guidance calls, by its name."""
    return name.startswith("transformer") or name == "unet"


def denoises(part: Component) -> bool:
    """Return True for a component that guidance calls, or that such a component calls, by its name or its tensors."""
    return is_denoiser(part.name) or (part.recognized is not None and part.recognized.kind in DENOISERS)


def index_path(documents: Documents) -> str:
    """Return the path of the index, or an empty string."""
    return next((path for path in INDEXES if path in documents.listing.files), "")


def named_by_index(path: str, index: Mapping[str, Any]) -> dict[str, Named]:
    """Return the components that an index names; those that it leaves open (``[null, null]``) are left out."""
    found = {}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) >= 2 and not name.startswith("_"):
            library, class_name, elsewhere = _index_entry(entry)
            if isinstance(library, str) and isinstance(class_name, str):
                found[name] = Named(library, class_name, path, elsewhere)
    return found


def _index_entry(entry: list[Any]) -> tuple[Any, Any, str]:
    """``[library, class]``, or a modular index's ``[library, class, {"type_hint": [...], "repo": ...}]``."""
    extra = entry[2] if len(entry) > 2 and isinstance(entry[2], dict) else {}
    hint = extra.get("type_hint")
    library, class_name = entry[:2]
    if library is None and isinstance(hint, list) and len(hint) == 2:
        library, class_name = hint
    return library, class_name, str(extra.get("pretrained_model_name_or_path") or extra.get("repo") or "")


def named_by_config(documents: Documents, folder: str) -> Named | None:
    """Return the class that a folder's own configuration names; an empty ``folder`` is the root."""
    for file, keys in CONFIGS.items():
        path = f"{folder}/{file}" if folder else file
        for key, library in keys:
            value = documents.object(path).get(key)
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, str) and value:
                return Named(library, value, path)
    return None


def find_components(documents: Documents, files: Mapping[str, WeightFile]) -> list[Component]:
    """Return all parts: those of the index in its order, then folders with a configuration, then single checkpoints."""
    path = index_path(documents)
    by_index = named_by_index(path, documents.object(path))
    folders = list(by_index) + sorted(_configured_folders(documents) - set(by_index))
    sets = group(files.values())
    parts = [_folder_component(documents, folder, by_index.get(folder), sets) for folder in folders]
    loose = [item for item in sets if item.folder not in folders]
    return [part for part in parts if part is not None] + list(_loose_components(documents, loose))


def _configured_folders(documents: Documents) -> set[str]:
    """Return the folders below the root that have a configuration."""
    folders = (path.rpartition("/")[::2] for path in documents.listing.files)
    return {folder for folder, name in folders if folder and name in CONFIGS}


def _folder_component(
    documents: Documents, folder: str, named: Named | None, sets: list[WeightSet]
) -> Component | None:
    named = named or named_by_config(documents, folder)
    taken, spare = choose([item for item in sets if item.folder == folder])
    if named is None and not taken:
        return None
    return _component(folder, named, taken, spare)


def _loose_components(documents: Documents, sets: list[WeightSet]) -> Iterator[Component]:
    """Yield one component per checkpoint outside of the components' folders."""
    by_place: dict[str, list[WeightSet]] = {}
    for item in sets:
        by_place.setdefault(f"{item.folder}/" if item.is_standard else item.name, []).append(item)
    for place, items in by_place.items():
        taken, spare = choose(items)
        named = named_by_config(documents, "") if place == "/" else None
        yield _component(place.rstrip("/") or items[0].stem, named, taken, spare)


def _component(name: str, named: Named | None, taken: list[WeightSet], spare: list[WeightSet]) -> Component:
    named = named or Named("", "", "")
    part = Component(
        name=name,
        library=named.library,
        class_name=named.class_name,
        known=bool(named.class_name) and library_has(named.library, named.class_name),
        source=named.source,
        weights=tuple(file for item in taken for file in item.files),
        spare=tuple(file for item in spare for file in item.files),
    )
    return part if part.known or not part.tensors else replace(part, recognized=recognize(part.manifest))
