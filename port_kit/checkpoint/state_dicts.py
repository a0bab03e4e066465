"""State dicts in the value of a pickle."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from port_kit.checkpoint.pickle_values import Opaque, TensorRef, refuse_opaque, unsupported
from port_kit.errors import CheckpointError
from port_kit.escape import quoted

_MOST_NAMES = 1_000_000
_MOST_PLACES = 64
_SHOWN_PLACES = 8
_BY_NAME = "load it with torch and save a dict of tensors by name"


def unwrap(root: Any, wrapper: str, name: str) -> list[dict[Any, Any]]:
    """Return the dicts from the root of a pickle to the one under the keys of a wrapper, which is the last."""
    path = [root]
    for key in split_wrapper(wrapper):
        above = path[-1]
        if not isinstance(above, dict) or key not in above:
            known = ", ".join(map(str, list(above)[:8])) if isinstance(above, dict) else f"a {_kind(above)}"
            raise CheckpointError(
                f"{name} has no key {quoted(key)} of the wrapper {quoted(wrapper)}; there is: {known}",
                code="pickle_wrapper",
                hint="name the keys above the tensors, dotted",
            )
        path.append(above[key])
    if isinstance(path[-1], Opaque):
        refuse_opaque(path[-1], name)
    if not isinstance(path[-1], dict):
        raise unsupported(f"{name} holds a {_kind(path[-1])}, not tensors by name", _BY_NAME)
    return path


def split_wrapper(wrapper: str) -> list[str]:
    """Return the keys of a wrapper; none for an empty one and for ``.``."""
    return list(filter(None, wrapper.split(".")))


def require_droppable(path: Sequence[dict[Any, Any]], wrapper: str, drop: Sequence[str], name: str) -> None:
    """Refuse names to drop that are neither among the selected values nor beside the keys of the wrapper.

    Raises:
        CheckpointError: ``pickle_drop``.
    """
    known = set(path[-1]).union(*(set(above) - {key} for above, key in zip(path, split_wrapper(wrapper), strict=False)))
    absent = [key for key in drop if key not in known]
    if absent:
        texts = sorted(key for key in known if isinstance(key, str))
        near = [close for key in absent for close in difflib.get_close_matches(key, texts, 1)]
        raise CheckpointError(
            f"{name} has no {', '.join(map(repr, absent))} to leave out; there is: {', '.join(texts[:8])}",
            code="pickle_drop",
            hint=f"did you mean {', '.join(near)}?" if near else "remove it from the names to drop",
        )


def flatten(selected: dict[Any, Any], drop: Sequence[str], name: str) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Split a state dict into its tensors and the kinds of other values, without those to drop."""
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
        raise unsupported(f"{name} names {len(tensors)} tensors")
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
        nbytes: of those with names.
    """

    path: str
    named: int
    unnamed: int
    nbytes: int

    def __str__(self) -> str:
        counts = [f"{self.named} by name"] if self.named else []
        counts += [f"{self.unnamed} in lists or under keys that are not text"] if self.unnamed else []
        return f"{self.path or 'the top level'} ({', '.join(counts)})"


class _Counted:
    """A dict or list of a pickle that is reached by text keys alone, and its tensors."""

    __slots__ = ("above", "content", "key", "named", "nbytes", "unnamed")

    def __init__(self, content: Any, above: _Counted | None = None, key: str = "") -> None:
        self.content, self.above, self.key = content, above, key
        self.named = self.unnamed = self.nbytes = 0

    def place(self) -> Place:
        keys, item = [], self
        while item.above is not None:
            keys.append(item.key)
            item = item.above
        return Place(".".join(reversed(keys)), self.named, self.unnamed, self.nbytes)


def count_elsewhere(root: Any, selected: dict[Any, Any] | None = None) -> tuple[Place, ...]:
    """Return the paths of tensors that are not in ``selected``, those with the most names first.

    Containers that text keys lead to are visited before the others, and each is counted once.
    """
    counted, seen = [_Counted(root)], dict[int, _Counted]()
    others: deque[tuple[Iterable[Any], _Counted]] = deque()
    for place in counted:  # grows
        known = seen.setdefault(id(place.content), place)
        if known is not place:  # a second name
            place.named, place.nbytes = known.named, known.nbytes
            continue
        if not isinstance(place.content, dict):
            others.append((place.content, place))
            continue
        for key, value in place.content.items():
            if not isinstance(key, str):
                others.append(((value,), place))
            elif isinstance(value, TensorRef):
                if place.content is not selected:
                    place.named, place.nbytes = place.named + 1, place.nbytes + value.entry.nbytes
            elif isinstance(value, (dict, list, tuple)):
                counted.append(_Counted(value, place, key))
    while others:
        values, place = others.popleft()
        for value in values:
            if isinstance(value, TensorRef):
                place.unnamed += 1
            elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
                seen[id(value)] = place
                others.append((value.values() if isinstance(value, dict) else value, place))
    found = [place for place in counted if place.named or place.unnamed]
    found.sort(key=lambda place: -place.named)
    return tuple(place.place() for place in found[:_MOST_PLACES])


def refuse_unselected(elsewhere: tuple[Place, ...], name: str) -> None:
    """Raise if tensors lie elsewhere, of a file whose selected dict has none; name the keys that may be named."""
    wrappers = [place.path for place in elsewhere if place.named]
    if wrappers:
        raise CheckpointError(
            f"{name}: the tensors lie under {describe_places(elsewhere)}",
            code="pickle_wrapper",
            hint=f"name the one that you want: --wrapper {wrappers[0] or '.'}",
            wrappers=wrappers,
        )
    if elsewhere:
        raise unsupported(f"{name}: no tensor has a name; they lie under {describe_places(elsewhere)}", _BY_NAME)


def describe_places(places: tuple[Place, ...]) -> str:
    """Return places as one phrase for messages."""
    shown = ", ".join(map(str, places[:_SHOWN_PLACES]))
    return shown + (f" and {len(places) - _SHOWN_PLACES} more places" if len(places) > _SHOWN_PLACES else "")
