"""Selections of whole rows and columns: what an adapter's matrices can follow of the ops that a weight goes through.

A weight of shape (outputs, ...) has rows along its first axis and columns along all others together. Whether a chain of
ops selects whole rows and columns is measured: it runs on a tensor of row numbers and on one of column numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from port_kit.regions import Shape
from port_kit.remap.tensor_ops import Call, Cast, TensorOp, apply

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """The rows and columns of a weight that a chain of ops keeps, in their new order.

    Attributes:
        before: the weight's shape.
        after: the shape that comes out of the ops.
        rows: numbers of rows; None for all of them in order.
        columns: the same of columns.
    """

    before: Shape
    after: Shape
    rows: Tensor | None = None
    columns: Tensor | None = None

    def of(self, kind: str, value: Tensor) -> Tensor | None:
        """Return what an adapter's tensor is for the selected part of the weight.

        Args:
            kind: ``A``, ``B``, ``A.bias``, ``B.bias``, ``magnitude``, ``alpha`` or ``diff``.
            value: the tensor, for the whole weight.

        Returns:
            The tensor; None if it belongs to all columns (or all rows) together and some are left out.
        """
        if kind == "alpha":
            return value
        if kind == "A":
            return _take(value.flatten(1), 1, self.columns).reshape(value.shape[0], *self.after[1:])
        if kind == "B":
            return _take(value.flatten(1), 0, self.rows).reshape(-1, value.shape[1], *[1] * (len(self.after) - 2))
        if kind == "diff":
            chosen = _take(value.reshape(self.before[0], -1), 0, self.rows)
            return _take(chosen, 1, self.columns).reshape(self.after)
        by_inputs = kind == "magnitude" and value.ndim == 2 and value.shape[0] == 1
        along, across = (self.columns, self.rows) if by_inputs else (self.rows, self.columns)
        count = math.prod(self.before[:1] if by_inputs else self.before[1:])
        if across is not None and across.unique().numel() != count:
            return None
        longest = max(range(value.ndim), key=lambda axis: value.shape[axis], default=0)
        return value if kind == "A.bias" else _take(value, longest, along)


def select(ops: Sequence[TensorOp], shape: Shape) -> Selection | None:
    """Return the rows and columns that ops select of a weight; None if they do anything else.

    One axis is measured at a time: numbers along the other axes are expanded, not stored.
    """
    import torch

    ops = [op for op in ops if not isinstance(op, Cast)]  # an adapter keeps its own dtype
    if not ops:
        return Selection(shape, shape)
    rows, inner = shape[0], shape[1:]
    try:
        # float32, as transforms expect weights: exact for as many numbers as an axis has
        by_row = apply(torch.arange(rows, dtype=torch.float32).view(-1, *[1] * len(inner)).expand(shape), ops)
        after = tuple(by_row.shape)
        picked_rows = _constant(by_row.reshape(after[0], -1), rows)
        del by_row
        numbers = torch.arange(math.prod(inner), dtype=torch.float32).view(1, *inner)
        by_column = apply(numbers.expand(shape), ops)
        picked_columns = _constant(by_column.reshape(after[0], -1).T, math.prod(inner))
        del by_column
        if picked_rows is None or picked_columns is None:
            return None
        if any(isinstance(op, Call) for op in ops) and not _holds(ops, shape, picked_rows, picked_columns):
            return None
    except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError):  # from a registered transform
        return None
    return Selection(shape, after, _unless_all(picked_rows, rows), _unless_all(picked_columns, math.prod(inner)))


def _constant(numbers: Tensor, count: int) -> Tensor | None:
    """The number of each row if all elements of the row have it and it is one of ``count``; else None."""
    first = numbers[:, 0]
    sound = bool((numbers == first[:, None]).all()) and bool(((first >= 0) & (first < count)).all())
    return first.long() if sound and bool((first == first.long()).all()) else None


def _holds(ops: Sequence[TensorOp], shape: Shape, rows: Tensor, columns: Tensor) -> bool:
    """Return True if the ops select these rows and columns of other values, too: transforms may compute."""
    import torch

    sample = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    got = apply(sample, ops)
    return bool((got.reshape(len(rows), -1) == sample.reshape(shape[0], -1)[rows][:, columns]).all())


def _unless_all(picked: Tensor, count: int) -> Tensor | None:
    import torch

    return None if torch.equal(picked, torch.arange(count)) else picked


def _take(value: Tensor, axis: int, numbers: Tensor | None) -> Tensor:
    return value if numbers is None else value.index_select(axis, numbers.to(value.device))
