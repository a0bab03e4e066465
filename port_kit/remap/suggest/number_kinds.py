"""Kinds of numbers: which dtypes a tensor can be copied between without a scale."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice, takewhile

from port_kit.manifest import TensorSpec
from port_kit.remap.suggest.vocabulary import LEAVES

#: dtypes that store values as they are; quantized formats use all others.
_PLAIN = frozenset({"float64", "float32", "float16", "bfloat16", "complex128", "complex64", "int64", "bool"})
_PARAMETERS = LEAVES.keys() - {"scale"}
_SCALE = re.compile(r"scale|scb|absmax|amax|quant|q?zeros?\b|zero_point", re.IGNORECASE)


def is_quantized(dtype: str) -> bool:
    """Return True if values of this dtype may need a scale that another tensor holds."""
    return dtype not in _PLAIN


def number_kinds(manifest: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Return the kind of every tensor; only tensors of equal kinds can be copied.

    A quantized tensor with further tensors in its module, which may hold its scale, is of a kind of its own dtype.
    """
    names = sorted(manifest)
    return {
        name: f"scaled {spec.dtype}" if is_quantized(spec.dtype) and _has_companion(name, names) else _kind(spec.dtype)
        for name, spec in manifest.items()
    }


def possible_scales(unused: Iterable[str], used: Collection[str], dtypes: Collection[str]) -> list[str]:
    """Return the unused tensors of a checkpoint that may scale a used one.

    In a quantized checkpoint these are all, otherwise those in a module of a used tensor with a name for a scale.
    """
    if any(map(is_quantized, dtypes)):
        return list(unused)
    modules = {""} | {name[:end] for name in used for end, sign in enumerate(name) if sign == "."}
    return [name for name in unused if is_named_scale(name) and name.rpartition(".")[0] in modules]


def is_named_scale(name: str) -> bool:
    """Return True if the name of a tensor is one for the scale or the zero point of quantized values."""
    leaf = name.rpartition(".")[2]
    return leaf not in LEAVES and bool(_SCALE.search(leaf))


def _kind(dtype: str) -> str:
    return next((kind for kind in ("float", "complex") if kind in dtype), "integer")


def _has_companion(name: str, names: Sequence[str]) -> bool:
    """Return True if a tensor that is no ordinary parameter lies in the module of this one, or extends its name."""
    module, _, leaf = name.rpartition(".")
    prefix = module if module and leaf in LEAVES else name
    following = islice(names, bisect_left(names, prefix), None)
    return any(
        other != name
        and other[len(prefix) : len(prefix) + 1] in (".", "_")
        and other.rpartition(".")[2] not in _PARAMETERS
        for other in takewhile(lambda other: other.startswith(prefix), following)
    )
