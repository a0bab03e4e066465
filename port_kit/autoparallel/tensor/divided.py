"""Numbers that are divided by the number of ranks: attributes, or entries of tuples and lists that they hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from port_kit.autoparallel.plan import DividedValue
from port_kit.errors import ParallelError
from port_kit.escape import reason_of

#: Entry of nested tuples or lists, outermost first; empty for a plain number.
Place = tuple[int, ...]


def place_of(index: int | Place | None) -> Place:
    """Return the place that ``DividedValue.index`` stands for."""
    if index is None:
        return ()
    return (index,) if isinstance(index, int) else index


def index_of(place: Place) -> int | Place | None:
    """Return the inverse of :func:`place_of`."""
    return place if len(place) > 1 else next(iter(place), None)


def places(value: Any) -> Iterator[tuple[Place, Any]]:
    """Yield the leaves of nested tuples and lists with their places."""
    if isinstance(value, (tuple, list)):
        for at, item in enumerate(value):
            yield from (((at, *rest), leaf) for rest, leaf in places(item))
    else:
        yield (), value


def with_divided(value: Any, place: Place, ranks: int) -> Any:
    """Return a copy in which the number at a place is divided.

    Raises:
        ValueError: the ranks do not divide it.
    """
    if not place:
        if value % ranks:
            raise ValueError(f"{ranks} ranks do not divide {value}")
        return value // ranks
    items = [with_divided(item, place[1:], ranks) if at == place[0] else item for at, item in enumerate(value)]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def divide_attribute(owner: Any, path: str, entry: DividedValue, ranks: int, *, code: str, degree: str) -> None:
    """Divide an attribute of a module.

    Args:
        owner: the module.
        path: its path, for the error.
        entry: attribute to divide.
        ranks: number of ranks.
        code: error code.
        degree: name of the degree, for the error.

    Raises:
        ParallelError: with ``code``; the ranks do not divide the number.
    """
    *inner, name = entry.attribute.split(".")
    for each in inner:
        owner = getattr(owner, each)
    try:
        setattr(owner, name, with_divided(getattr(owner, name), place_of(entry.index), ranks))
    except ValueError as error:
        raise ParallelError(
            f"{path}: {entry.attribute}: {reason_of(error)}",
            code=code,
            hint=f"use a {degree} size that divides it",
        ) from error
