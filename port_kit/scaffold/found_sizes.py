"""Sizes of a found model: configurations, tiny sizes, and the size of an output per latent."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from port_kit.manifest import Manifest
from port_kit.port import lookup
from port_kit.scaffold.parts import Part

_LIST = re.compile(r"([^.]+)\.(\d+)\.")
#: Tiny width, heads and layers.
_WIDTH, _HEADS, _LAYERS = 64, 4, 2
#: Keys of configurations that count heads.
_HEAD_KEYS = re.compile(r"(num_)?(attention_)?heads|n_heads?")
#: Pixels of a latent along a side and frames of a latent, of most VAEs; a known one says its own.
_USUAL = {"size_multiple": 8, "frame_step": 4}


def config_of(part: Part) -> Mapping[str, Any]:
    """Return a part's configuration as its source has it; without one, what the shapes tell."""
    if part.config:
        return part.config
    tensors = _manifest(part)
    width, lists = _width(tensors), _lists(tensors)
    told: dict[str, Any] = {"dim": width} if width else {}
    return {**told, **({"layers": max(lists.values())} if lists else {})}


def tiny_sizes(part: Part) -> dict[str, dict[Any, Any]]:
    """Return ``sizes``, ``layers`` and ``config`` of the tiny part: a width of 64, and two of each kind of layer."""
    tensors, full = _manifest(part), config_of(part)
    width, lists = _width(tensors), _lists(tensors)
    layers = {name: _LAYERS for name, count in lists.items() if count > _LAYERS}
    sizes = {width: _WIDTH} if width > _WIDTH else {}
    config = {key: _WIDTH for key, value in full.items() if value == width and sizes}
    counts = {lists[name] for name in layers}
    config |= {key: _LAYERS for key, value in full.items() if type(value) is int and value in counts}
    config |= {key: _HEADS for key, value in full.items() if _HEAD_KEYS.fullmatch(key) and type(value) is int and sizes}
    return {"sizes": sizes, "layers": layers, "config": config}


def output_sizes(parts: Sequence[Part]) -> dict[str, int]:
    """Return pixels and frames of a latent: of the known VAE, else the usual ones."""
    for part in parts:
        full: Any = lookup(part.recognized.config) if part.recognized else None
        if isinstance(full, Mapping) and "scale_factor_spatial" in full:
            return {"size_multiple": full["scale_factor_spatial"], "frame_step": full["scale_factor_temporal"]}
    return dict(_USUAL)


def _manifest(part: Part) -> Manifest:
    return part.component.manifest if part.component else Manifest({})


def _width(tensors: Manifest) -> int:
    """Return the extent that most matrices read; 0 if there are none."""
    return _most(spec.shape[1] for spec in tensors.values() if len(spec.shape) == 2)


def _lists(tensors: Manifest) -> dict[str, int]:
    """Return the lists of modules that no other list contains, with their lengths."""
    lengths: dict[str, int] = {}
    for name in tensors:
        found = _LIST.search(name)
        if found:
            lengths[found[1]] = max(lengths.get(found[1], 0), int(found[2]) + 1)
    return lengths


def _most(extents: Iterable[int]) -> int:
    counted = Counter(extents).most_common(1)
    return counted[0][0] if counted else 0
