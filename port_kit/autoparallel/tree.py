"""Leaves of nested arguments and outputs, by dotted path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

#: Tensors and integers are leaves; the rest of a nested value is structure or ignored.
Change = Callable[[str, Any], Any]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of mappings, lists and tuples with its path; a value that is no container has the given path."""
    for key, item in _items(value):
        yield from leaves(item, f"{path}.{key}" if path else str(key))
    if not _is_container(value):
        yield path, value


def rebuild(value: Any, change: Change, path: str = "") -> Any:
    """Return the same nesting with every leaf replaced by ``change(path, leaf)``."""
    if not _is_container(value):
        return change(path, value)
    items = {key: rebuild(item, change, f"{path}.{key}" if path else str(key)) for key, item in _items(value)}
    if isinstance(value, Mapping):
        return type(value)(items) if type(value) is dict else type(value)(**items)
    if hasattr(value, "_fields"):
        return type(value)(*items.values())
    return type(value)(items.values())


def shapes(value: Any) -> dict[str, tuple[int, ...] | int]:
    """Return the shapes of tensors and the values of integers, by path."""
    found: dict[str, tuple[int, ...] | int] = {}
    for path, leaf in leaves(value):
        if torch.is_tensor(leaf):
            found[path] = tuple(leaf.shape)
        elif isinstance(leaf, int) and not isinstance(leaf, bool):
            found[path] = leaf
    return found


class Arguments:
    """Names of a module's arguments, to address positional and keyword arguments alike.

    Args:
        module: module whose ``forward`` has the signature.
    """

    def __init__(self, module: nn.Module) -> None:
        kind: Any = getattr(
            module, "replaces", type(module)
        )  # callers know the arguments of the class that it replaces
        parameters = inspect.signature(kind.forward).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = tuple(p.name for p in parameters if p.kind in kinds)[1:]

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return all arguments by name; extra positional arguments are numbered."""
        names = [*self.names, *map(str, range(len(self.names), len(args)))]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def split(self, named: Mapping[str, Any], args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments as they were passed: the first ones positional, as many as in ``args``."""
        values = list(named.values())
        return tuple(values[: len(args)]), dict(list(named.items())[len(args) :])


def _is_container(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple)) and not isinstance(value, torch.Size)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif _is_container(value):
        yield from enumerate(value)
