"""Leaves of nested arguments and results, by path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

#: Keys of mappings and indexes of sequences, from the outside to a leaf.
Path = tuple[Any, ...]


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every leaf with its path; mappings, lists and tuples are inner nodes."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for key, item in enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def map_leaves(value: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """Return the same nesting with ``change(path, leaf)`` for every leaf."""
    if isinstance(value, Mapping):
        items = {key: map_leaves(item, change, (*path, key)) for key, item in value.items()}
        return type(value)(**items) if hasattr(value, "to_tuple") else items
    if isinstance(value, (list, tuple)):
        changed = [map_leaves(item, change, (*path, key)) for key, item in enumerate(value)]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    return change(path, value)
