"""Leaves of nested arguments and results, by path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

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


def argument_path(module: nn.Module, path: Path) -> str:
    """Return the dotted path of an argument by its name in ``forward``, for a path in ``{"args", "kwargs"}``."""
    kind, first, *rest = path
    name = list(inspect.signature(module.forward).parameters)[first] if kind == "args" else first
    return ".".join(map(str, (name, *rest)))


def named_arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by their names in ``forward``, positional ones first."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    names += [str(index) for index in range(len(names), len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def passed_arguments(named: Mapping[str, Any], args: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return named arguments as they were passed, with as many positional ones as ``args``."""
    values = list(named.items())
    return tuple(value for _, value in values[: len(args)]), dict(values[len(args) :])
