"""Batching of denoising states into calls of the transformer.

The result for a state does not depend on the rest of the batch, up to the rounding of larger matrix products. States
fit together if everything that is not a tensor is equal and the tensors have equal shapes. Texts must have equal
lengths, because they are not padded.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from port_kit.models.wan.pipeline.request_state import DenoiseState
from port_kit.models.wan.transformer.modality_io import TextContext

#: Arguments of the transformer in one guidance branch.
Branch = Mapping[str, Any]

#: Latent cells and audio latents of the states of one call, 4 cells per token. A state of the default size (89,280
#: and 157) fills a device by itself: batching such states would cost memory and gain no time.
MAX_BATCH_CELLS = 131_072


def group_requests(states: Sequence[DenoiseState], branches: Sequence[Sequence[Branch]]) -> list[list[int]]:
    """Return the indices of the states of each call, in order.

    Args:
        states: each before its next step.
        branches: of each state.
    """
    found: dict[Hashable, list[list[int]]] = {}
    for index, (state, own) in enumerate(zip(states, branches, strict=True)):
        size = _size(state)
        key = (state.prepared.request.scales, *(_form(one) for one in own))
        rows = found.setdefault(key, [[]])
        if rows[-1] and (len(rows[-1]) + 1) * size > MAX_BATCH_CELLS:
            rows.append([])
        rows[-1].append(index)
    return [row for rows in found.values() for row in rows]


def collate(branches: Sequence[Branch]) -> dict[str, Any]:
    """Return one branch of several states as the arguments of one call; a single state's as they are."""
    first = branches[0]
    if len(branches) == 1:
        return dict(first)
    return {name: _together([one[name] for one in branches]) for name in first}


def _together(values: Sequence[Any]) -> Any:
    if isinstance(values[0], TextContext):
        return TextContext.collate(values)
    if isinstance(values[0], Tensor):
        return torch.cat([value.reshape(1) if value.ndim == 0 else value for value in values])
    return values[0]


def _form(one: Branch) -> Hashable:
    """Return the properties of a branch that must be equal within a call."""
    return tuple((name, _form_of(value)) for name, value in sorted(one.items()))


def _form_of(value: Any) -> Hashable:
    value = value.raw if isinstance(value, TextContext) else value
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _size(state: DenoiseState) -> int:
    return state.video[:, 0].numel() + state.audio[:, :, 0].numel()
