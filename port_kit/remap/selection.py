"""Selections of complete rows and columns: the ops on a weight that an adapter's matrices can follow.

A weight of shape (outputs, ...) has rows along its first axis and columns along all others together. To find out if a
chain of ops selects complete rows and columns, it runs on a tensor of row numbers and on one of column numbers.
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
        after: the shape of the ops' result.
        rows: numbers of rows; None for all of them in order.
        columns: the same of columns.
    """

    before: Shape
    after: Shape
    rows: Tensor | None = None
    columns: Tensor | None = None

    def of(self, kind: str, value: Tensor) -> Tensor | None:
        """Return an adapter's tensor for the selected part of the weight.

        Args:
            kind: ``A``, ``B``, ``A.bias``, ``B.bias``, ``magnitude``, ``alpha`` or ``diff``.
            value: the tensor, for the complete weight.

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
    """Return the rows and columns of a weight that ops select; None if they do anything else.

    One axis is measured at a time: numbers along the other axes are expanded, not stored.
    """
    import torch

    ops = [op for op in ops if not isinstance(op, Cast)]  # an adapter keeps its own dtype
    if not ops:
        return Selection(shape, shape)
    rows, columns = torch.arange(shape[0]), torch.arange(math.prod(shape[1:]))
    try:
        after, by_row = _run(ops, rows.view(-1, *[1] * len(shape[1:])), shape)
        picked_rows = _constant(by_row, len(rows))
        del by_row
        _, by_column = _run(ops, columns.view(1, *shape[1:]), shape)
        picked_columns = _constant(by_column.T, len(columns))
        del by_column
        if picked_rows is None or picked_columns is None:
            return None
        if any(isinstance(op, Call) for op in ops):  # a transform may compute: try other values
            sample = torch.rand(shape, generator=torch.Generator().manual_seed(0))
            if not bool(
                (_run(ops, sample, shape)[1] == sample.reshape(len(rows), -1)[picked_rows][:, picked_columns]).all()
            ):
                return None
    except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError):  # from a registered transform
        return None
    rows_or_all = None if torch.equal(picked_rows, rows) else picked_rows
    return Selection(shape, after, rows_or_all, None if torch.equal(picked_columns, columns) else picked_columns)


def _run(ops: Sequence[TensorOp], values: Tensor, shape: Shape) -> tuple[Shape, Tensor]:
    """Return the shape of a result, and the result as a matrix.

    Values are float32, as transforms expect weights: exact for as many numbers as an axis has.
    """
    result = apply(values.float().expand(shape), ops)
    return tuple(result.shape), result.reshape(result.shape[0], -1)


def _constant(numbers: Tensor, count: int) -> Tensor | None:
    """Return the number in each row of a matrix; None if a row has several, or one that is not in ``range(count)``."""
    first = numbers[:, 0]
    sound = bool((numbers == first[:, None]).all()) and bool(((first >= 0) & (first < count)).all())
    return first.long() if sound and bool((first == first.long()).all()) else None


def _take(value: Tensor, axis: int, numbers: Tensor | None) -> Tensor:
    return value if numbers is None else value.index_select(axis, numbers.to(value.device))
