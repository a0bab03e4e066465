"""Rows of a batch in the nested arguments and results of a call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Layout of the rows of a batch in nested values.

    Attributes:
        batch: number of rows. Tensors whose first dimension has that size have one entry per row.
        lists: lists of that length have one entry per row, too.
    """

    batch: int
    lists: bool

    def split(self, value: Any) -> bool:
        """Return True if a value has anything with one entry per row."""
        return any(self.of(item) for item in _nodes(value))

    def covers(self, value: Any) -> bool:
        """Return True if every tensor in a value belongs to a row."""
        if isinstance(value, Tensor):
            return self.of(value)
        if self.of(value):
            return True
        return all(self.covers(item) for item in _children(value))

    def of(self, value: Any) -> bool:
        """Return True if a value has one entry per row."""
        if isinstance(value, Tensor):
            return value.dim() > 0 and value.shape[0] == self.batch
        return self.lists and isinstance(value, list) and len(value) == self.batch

    def divide(self, ranks: int) -> list[slice]:
        """Return the rows of each rank; the first ranks have one more if they do not divide evenly."""
        small, more = divmod(self.batch, ranks)
        starts = [rank * small + min(rank, more) for rank in range(ranks + 1)]
        return [slice(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]


def take_rows(value: Any, part: slice, rows: Rows) -> Any:
    """Return nested arguments reduced to some of the rows; values without rows stay."""
    if rows.of(value):
        return value[part]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(take_rows(item, part, rows) for item in value))
    if type(value) in (tuple, list):
        return type(value)(take_rows(item, part, rows) for item in value)
    if type(value) is dict:
        return {key: take_rows(item, part, rows) for key, item in value.items()}
    return value


def row_leaves(value: Any, rows: Rows | None = None, part: slice | None = None) -> list[Tensor]:
    """Return the tensors of a nested result in order; with ``rows``, their views of some of the rows."""
    if rows is not None and rows.of(value):
        value, rows = value[part], None
    if isinstance(value, Tensor):
        return [value]
    return [leaf for item in _children(value) for leaf in row_leaves(item, rows, part)]


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, tuple | list) else []


def _nodes(value: Any) -> Iterator[Any]:
    yield value
    for item in _children(value):
        yield from _nodes(item)
