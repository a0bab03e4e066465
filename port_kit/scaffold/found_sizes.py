"""Sizes of a found model: configurations, tiny sizes, and the size of an output per latent."""

from __future__ import annotations

import math
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
#: Keys of configurations that count layers, that are the width of the tokens, and that are channels of latents.
_LAYER_KEYS = re.compile(r"(n|num)_(hidden_|transformer_)?(layers?|blocks?)|depth|layers")
_TINY_LAYER_KEYS = re.compile(r"layer|block|depth|stage")
_WIDTH_KEYS = re.compile(r"dim|width|hidden_size|d_model|model_dim|embed_dim|n_embd")
_CHANNEL_KEYS = (
    "channels",
    "latent_channels",
    "in_channels",
    "latent",
    "latent_dim",
    "z_dim",
    "in_dim",
    "out_channels",
)
#: Parameters of the generated transformer.
_SKELETON = ("channels", "dim", "heads", "layers", "hidden")
#: Keys of configurations that count heads.
_HEAD_KEYS = re.compile(r"(num_)?(attention_)?heads|n_heads?")
#: Pixels of a latent along a side and frames of a latent, of most VAEs; a known one says its own.
_USUAL = {"size_multiple": 8, "frame_step": 4}


def config_of(part: Part) -> Mapping[str, Any]:
    """Return a part's configuration as its source has it; without one, what its class and its shapes say.

    Parameters of the class keep their defaults, except for numbers of layers and the width, which the shapes show.
    """
    if part.config:
        return part.config
    tensors = _manifest(part)
    width, lists = _width(tensors), _lists(tensors)
    layers = _longest(tensors, lists)
    known: dict[str, Any] = {key: value for key, value in part.parameters.items() if value is not ...}
    if not part.parameters:
        return {**({"dim": width} if width else {}), **({"layers": layers} if layers else {})}
    for key, default in part.parameters.items():
        if key in lists and type(default) is int:
            known[key] = lists[key]
        elif layers and _LAYER_KEYS.fullmatch(key):
            known[key] = layers
        elif width and _WIDTH_KEYS.fullmatch(key):
            known[key] = width
    return known


def open_keys(part: Part) -> list[str]:
    """Return the parameters of a part's class, or of the generated transformer, that nothing says."""
    if part.config or not part.parameters:
        return [key for key in _SKELETON if key not in config_of(part)] if is_skeleton(part) else []
    return [key for key in part.parameters if key not in config_of(part)]


def is_skeleton(part: Part) -> bool:
    """Return True if the generated transformer's parameters are all that is known of a configuration's keys."""
    return part.kind == "transformer" and not part.config and not part.parameters


def channels_key(part: Part) -> str:
    """Return the key of a transformer's configuration that has the channels of the latents, or an empty string."""
    keys = () if part.recognized else (*config_of(part), *open_keys(part))
    return next((key for key in _CHANNEL_KEYS if key in keys), "")


def tiny_sizes(part: Part) -> dict[str, dict[Any, Any]]:
    """Return ``sizes``, ``layers`` and ``config`` of the tiny part: a width of 64, and two of each kind of layer."""
    tensors, full = _manifest(part), config_of(part)
    width, lists = _width(tensors), _lists(tensors)
    layers = {name: _LAYERS for name, count in lists.items() if count > _LAYERS}
    sizes = {width: _WIDTH} if width > _WIDTH else {}
    config = {key: _WIDTH for key, value in full.items() if value == width and sizes}
    counts = {lists[name] for name in layers}
    config |= {key: _LAYERS for key, value in full.items() if _counts_layers(key, lists) and value in counts}
    config |= {key: _HEADS for key, value in full.items() if _HEAD_KEYS.fullmatch(key) and type(value) is int and sizes}
    return {"sizes": sizes, "layers": layers, "config": config}


def _counts_layers(key: str, lists: Mapping[str, int]) -> bool:
    return key in lists or _TINY_LAYER_KEYS.search(key) is not None


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


def _longest(tensors: Manifest, lists: Mapping[str, int]) -> int:
    """Return the length of the list with the most elements, the layers; 0 if there is no list."""
    elements: Counter[str] = Counter()
    for name, spec in tensors.items():
        found = _LIST.search(name)
        if found:
            elements[found[1]] += math.prod(spec.shape)
    return lists[elements.most_common(1)[0][0]] if elements else 0


def _most(extents: Iterable[int]) -> int:
    counted = Counter(extents).most_common(1)
    return counted[0][0] if counted else 0
