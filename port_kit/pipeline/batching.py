"""Batching of denoising states into calls of the transformer.

The result for a state does not depend on the rest of the batch, up to the rounding of larger matrix products. States
fit together if everything that is not a tensor is equal and the tensors have equal shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

#: Arguments of the transformer in one guidance branch.
Branch = Mapping[str, Any]


@runtime_checkable
class Collatable(Protocol):
    """An argument of the transformer that is neither a tensor nor a plain value, and can be batched."""

    @property
    def batch_key(self) -> Hashable:
        """Properties that must be equal within a batch."""

    @classmethod
    def collate(cls, parts: Sequence[Self]) -> Self:
        """Return the parts as one batch, in order."""


def group_states(
    keys: Sequence[Hashable], branches: Sequence[Sequence[Branch]], sizes: Sequence[int], limit: int
) -> list[list[int]]:
    """Return the indices of the states of each call, in order.

    Args:
        keys: per state, further properties that must be equal within a call.
        branches: of each state's next step.
        sizes: per state, in any unit.
        limit: of the total size of a call of more than one state.
    """
    found: dict[Hashable, list[list[int]]] = {}
    for index, (key, own, size) in enumerate(zip(keys, branches, sizes, strict=True)):
        rows = found.setdefault((key, *(_branch_key(branch) for branch in own)), [[]])
        if rows[-1] and (len(rows[-1]) + 1) * size > limit:
            rows.append([])
        rows[-1].append(index)
    return [row for rows in found.values() for row in rows]


def collate(branches: Sequence[Branch]) -> dict[str, Any]:
    """Return one branch of several states as the arguments of one call; a single state's as they are."""
    first = branches[0]
    if len(branches) == 1:
        return dict(first)
    return {name: _collate([branch[name] for branch in branches]) for name in first}


def _collate(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat([value.reshape(1) if value.ndim == 0 else value for value in values])
    return type(first).collate(values) if isinstance(first, Collatable) else first


def _branch_key(branch: Branch) -> Hashable:
    return tuple((name, _value_key(value)) for name, value in sorted(branch.items()))


def _value_key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return value.batch_key if isinstance(value, Collatable) else value
