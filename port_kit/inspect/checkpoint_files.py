"""Grouping of tensor files into checkpoints: shards, indexes, variants, and the files that a loader selects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from port_kit.inspect.report import Finding, WeightFile
from port_kit.inspect.weights import split_suffix

#: Names that libraries give to the one checkpoint of a folder; files of these stems hold the same tensors.
STANDARD_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")
#: Order in which loaders prefer the formats of the same tensors.
_ORDER = ("safetensors", "torch", "gguf")


@dataclass(frozen=True)
class WeightSet:
    """One checkpoint: a file, or all shards of one.

    Attributes:
        folder: its folder, empty for the root.
        stem: its name without suffix, shard number and variant (``model``).
        variant: ``fp16`` of ``model.fp16.safetensors``; only of standard stems.
        suffix: ``.safetensors``.
        files: in the order of their names.
        shards: how many there should be; 0 for a single file.
    """

    folder: str
    stem: str
    variant: str
    suffix: str
    files: tuple[WeightFile, ...]
    shards: int

    @property
    def name(self) -> str:
        """Its path without suffix."""
        return f"{self.folder}/{self.stem}" if self.folder else self.stem

    @property
    def is_standard(self) -> bool:
        """True if the name is the one that a library gives to the only checkpoint of a folder."""
        return self.stem in STANDARD_STEMS

    @property
    def rank(self) -> tuple[int, bool]:
        """Sort key; loaders prefer the lowest."""
        family = self.files[0].format.partition(" ")[0]
        return (_ORDER.index(family) if family in _ORDER else len(_ORDER), bool(self.variant))


def group(files: Iterable[WeightFile]) -> list[WeightSet]:
    """Group the files of each checkpoint."""
    grouped: dict[tuple[str, str, str, str, int], list[WeightFile]] = {}
    for file in files:
        grouped.setdefault(_key(file.path), []).append(file)
    return [
        WeightSet(folder, stem, variant, suffix, tuple(sorted(parts, key=lambda part: part.path)), shards)
        for (folder, stem, variant, suffix, shards), parts in sorted(grouped.items())
    ]


def _key(path: str) -> tuple[str, str, str, str, int]:
    stem, suffix = split_suffix(path)
    folder, _, name = stem.rpartition("/")
    shard = _SHARD.fullmatch(name)
    shards = int(shard[3]) if shard else 0
    name = shard[1] + shard[4] if shard else name
    base, _, variant = name.partition(".")
    return (folder, base, variant, suffix, shards) if base in STANDARD_STEMS else (folder, name, "", suffix, shards)


def choose(sets: list[WeightSet]) -> tuple[list[WeightSet], list[WeightSet]]:
    """Split the sets of one component's folder into those that a loader takes and the others.

    vLLM-Omni takes all safetensors files of a folder, or all of the next format; other variants and formats of the
    same tensors are counted once.
    """
    if not sets:
        return [], []
    best = min(item.rank for item in sets)
    taken = [item for item in sets if item.rank == best]
    return taken, [item for item in sets if item.rank != best]


@dataclass(frozen=True)
class Index:
    """A ``*.index.json``: ``weight_map`` with paths relative to the repository."""

    path: str
    weight_map: Mapping[str, str]


def read_index(path: str, content: bytes) -> Index | Finding:
    """Read an index, or return a finding if the content is not an index."""
    folder = path.rpartition("/")[0]
    try:
        weight_map = json.loads(content)["weight_map"]
        return Index(path, {str(name): _beside(folder, str(file)) for name, file in weight_map.items()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Finding(path, "is no index: it has no weight_map of tensor names to files")


def _beside(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder else file


def missing_shards(
    sets: Iterable[WeightSet], indexes: Iterable[Index], files: Mapping[str, WeightFile]
) -> Iterator[Finding]:
    """Yield missing shards and indexes that disagree with their files."""
    indexed: set[str] = set()
    for index in indexes:
        indexed |= set(index.weight_map.values())
        yield from _index_gaps(index, files)
    for item in sets:
        if item.shards and len(item.files) != item.shards and not {file.path for file in item.files} & indexed:
            yield Finding(item.files[0].path, f"{len(item.files)} of {item.shards} shards are there")


def _index_gaps(index: Index, files: Mapping[str, WeightFile]) -> Iterator[Finding]:
    wanted = sorted(set(index.weight_map.values()))
    absent = [path for path in wanted if path not in files]
    if absent:
        yield Finding(index.path, f"names {len(wanted)} files, {len(absent)} are missing: {_some(absent)}")
    readable = {path: files[path].entries for path in wanted if path in files and not files[path].problem}
    misplaced = [name for name, path in index.weight_map.items() if path in readable and name not in readable[path]]
    if misplaced:
        yield Finding(index.path, f"places {len(misplaced)} tensors in files that lack them: {_some(misplaced)}")
    unlisted = [name for entries in readable.values() for name in entries if name not in index.weight_map]
    if unlisted:
        yield Finding(index.path, f"lacks {len(unlisted)} tensors that its files hold: {_some(unlisted)}")


def duplicate_tensors(taken: Iterable[WeightSet]) -> Iterator[Finding]:
    """Yield tensors that would be loaded from two files of one component."""
    seen: dict[str, str] = {}
    for file in (file for item in taken for file in item.files):
        both = [name for name in file.entries if name in seen]
        if both:
            yield Finding(file.path, f"{len(both)} of its tensors are also in {seen[both[0]]}: {_some(both)}")
        seen |= dict.fromkeys(file.entries, file.path)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
