"""The tensors by name in what a pickle holds, and where further ones lie."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from port_kit.checkpoint.pickle_values import Opaque, TensorRef, refuse_opaque
from port_kit.errors import CheckpointError

_MOST_NAMES = 1_000_000
_MOST_PLACES = 64
_SHOWN_PLACES = 8
_BY_NAME = "load it with torch and save a dict of tensors by name"


def unwrap(root: Any, wrapper: str, name: str) -> dict[Any, Any]:
    """Return the dict under the keys of a wrapper.

    Raises:
        CheckpointError: ``pickle_wrapper`` for a key that is not there, ``pickle_unsupported`` for what is no dict.
    """
    for key in filter(None, wrapper.split(".")):
        if not isinstance(root, dict) or key not in root:
            known = ", ".join(map(str, list(root)[:8])) if isinstance(root, dict) else f"a {_kind(root)}"
            raise CheckpointError(
                f"{name} has no key {key!r} of the wrapper {wrapper!r}; there is: {known}",
                code="pickle_wrapper",
                hint="name the keys above the tensors, dotted",
            )
        root = root[key]
    if isinstance(root, Opaque):
        refuse_opaque(root, name)
    if not isinstance(root, dict):
        raise CheckpointError(
            f"{name} holds a {_kind(root)}, not tensors by name", code="pickle_unsupported", hint=_BY_NAME
        )
    return root


def flatten(selected: dict[Any, Any], drop: Sequence[str], name: str) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Split a state dict into its tensors and other values, without those to drop.

    Raises:
        CheckpointError: ``pickle_drop`` for a name that is not there, ``pickle_unsafe`` for a value that would have to
            be built.
    """
    absent = [key for key in drop if key not in selected]
    if absent:
        texts = [key for key in selected if isinstance(key, str)]
        near = [close for key in absent for close in difflib.get_close_matches(key, texts, 1)]
        raise CheckpointError(
            f"{name} has no {', '.join(map(repr, absent))} that could be left out",
            code="pickle_drop",
            hint=f"did you mean {', '.join(near)}?" if near else "correct the names to drop",
        )
    tensors: dict[str, TensorRef] = {}
    others: dict[str, str] = {}
    for key, value in selected.items():
        if key in drop:
            continue
        if isinstance(key, str) and isinstance(value, TensorRef):
            tensors[key] = value
            continue
        refuse_opaque((key, value), name, key if isinstance(key, str) else "")
        shown = key if isinstance(key, str) else _kind(key) if isinstance(key, Opaque) else repr(key)
        others[shown[:80]] = _kind(value)
    if len(tensors) > _MOST_NAMES:
        raise CheckpointError(f"{name} names {len(tensors)} tensors", code="pickle_unsupported")
    return tensors, others


def _kind(value: Any) -> str:
    if isinstance(value, Opaque):
        return value.name
    return "tensor" if isinstance(value, TensorRef) else type(value).__name__


class Place(NamedTuple):
    """Tensors of a pickle that were not selected.

    Attributes:
        path: the keys above them, dotted; empty for the top level.
        named: how many have names there, so that ``path`` can be the wrapper.
        unnamed: how many lie in lists or under keys that are not text, there or below.
    """

    path: str
    named: int
    unnamed: int

    def __str__(self) -> str:
        counts = [f"{self.named} by name"] if self.named else []
        counts += [f"{self.unnamed} in lists or under keys that are not text"] if self.unnamed else []
        return f"{self.path or 'the top level'} ({', '.join(counts)})"


class _Counted:
    """A dict or list of a pickle that is reached by text keys alone, and its tensors."""

    def __init__(self, above: _Counted | None, key: str) -> None:
        self.above, self.key = above, key
        self.named = self.unnamed = 0

    def place(self) -> Place:
        keys, item = [], self
        while item.above is not None:
            keys.append(item.key)
            item = item.above
        return Place(".".join(reversed(keys)), self.named, self.unnamed)


def count_elsewhere(root: Any, selected: dict[Any, Any]) -> tuple[Place, ...]:
    """Return where tensors lie that are not in ``selected`` by name, the places of most names first."""
    return _Walk(selected).count(root)


class _Walk:
    """Counts tensors by place; what has names is walked first, and every container once."""

    def __init__(self, selected: dict[Any, Any]) -> None:
        self._selected = selected
        self._seen: dict[int, _Counted] = {}
        self._dicts: deque[tuple[dict[Any, Any], _Counted]] = deque()
        self._rest: deque[tuple[Any, _Counted]] = deque()
        self._found: list[_Counted] = []

    def count(self, root: dict[Any, Any]) -> tuple[Place, ...]:
        self._dicts.append((root, _Counted(None, "")))
        while self._dicts or self._rest:
            if self._dicts:
                self._visit_dict(*self._dicts.popleft())
            else:
                self._visit_rest(*self._rest.popleft())
        counted = [item for item in self._found if item.named or item.unnamed]
        counted.sort(key=lambda item: -item.named)
        return tuple(item.place() for item in counted[:_MOST_PLACES])

    def _visit_dict(self, container: dict[Any, Any], place: _Counted) -> None:
        self._found.append(place)
        known = self._seen.setdefault(id(container), place)
        if known is not place:  # a second name of the same dict
            place.named = known.named
            return
        for key, value in container.items():
            if not isinstance(key, str):
                self._count_unnamed(value, place)
            elif isinstance(value, TensorRef):
                place.named += container is not self._selected
            elif isinstance(value, dict):
                self._dicts.append((value, _Counted(place, key)))
            elif isinstance(value, (list, tuple)):
                below = _Counted(place, key)
                self._found.append(below)
                self._rest.append((value, below))

    def _visit_rest(self, container: Any, place: _Counted) -> None:
        if id(container) not in self._seen:
            self._seen[id(container)] = place
            for value in container.values() if isinstance(container, dict) else container:
                self._count_unnamed(value, place)

    def _count_unnamed(self, value: Any, place: _Counted) -> None:
        if isinstance(value, TensorRef):
            place.unnamed += 1
        elif isinstance(value, (dict, list, tuple)) and id(value) not in self._seen:
            self._rest.append((value, place))


def refuse_unselected(elsewhere: tuple[Place, ...], name: str) -> None:
    """Raise if tensors lie elsewhere, of a file whose selected dict has none.

    Raises:
        CheckpointError: ``pickle_wrapper`` with the keys that may be named, ``pickle_unsupported`` if there are none.
    """
    if not elsewhere:
        return
    wrappers = [place.path for place in elsewhere if place.named]
    if not wrappers:
        raise CheckpointError(
            f"{name}: no tensor has a name; they lie under {describe_places(elsewhere)}",
            code="pickle_unsupported",
            hint=_BY_NAME,
        )
    raise CheckpointError(
        f"{name}: the tensors lie under {describe_places(elsewhere)}",
        code="pickle_wrapper",
        hint=f"name the one that you want: --wrapper {wrappers[0] or '.'}",
        wrappers=wrappers,
    )


def describe_places(places: tuple[Place, ...]) -> str:
    """Return places as one phrase for messages."""
    shown = ", ".join(map(str, places[:_SHOWN_PLACES]))
    return shown + (f" and {len(places) - _SHOWN_PLACES} more places" if len(places) > _SHOWN_PLACES else "")
