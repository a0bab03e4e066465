"""Clips that are denoised at the same time: which of them one call of the transformer may hold, and how they are put
together.

A call's result for a clip does not depend on what else is in it, up to the rounding of larger matrix products. Clips
fit together where everything that is not a tensor is equal and the tensors have equal shapes; texts must be equally
long, because they are not padded.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from port_kit.models.wan.pipeline.request_state import Denoising
from port_kit.models.wan.transformer.modality_io import TextContext

#: The transformer's arguments in one guidance pass.
Pass = Mapping[str, Any]

#: Latent cells and audio latents that clips of one call may have together, 4 cells a token. A clip of the default size
#: (89,280 cells and 157) fills a device by itself: together, such clips would cost memory and gain no time.
LARGEST_CALL = 131_072


def groups(clips: Sequence[Denoising], passes: Sequence[Sequence[Pass]]) -> list[list[int]]:
    """Return the places of the clips that go together, in order; none is left out.

    Args:
        clips: each before its next step.
        passes: of each clip.
    """
    found: dict[Hashable, list[list[int]]] = {}
    for index, (clip, own) in enumerate(zip(clips, passes, strict=True)):
        size = _size(clip)
        key = (clip.job.request.scales, *(_form(one) for one in own))
        rows = found.setdefault(key, [[]])
        if rows[-1] and (len(rows[-1]) + 1) * size > LARGEST_CALL:
            rows.append([])
        rows[-1].append(index)
    return [row for rows in found.values() for row in rows]


def join(passes: Sequence[Pass]) -> dict[str, Any]:
    """Put one pass of several clips that go together into one call; a clip alone is passed on as it is."""
    first = passes[0]
    if len(passes) == 1:
        return dict(first)
    return {name: _together([one[name] for one in passes]) for name in first}


def _together(values: Sequence[Any]) -> Any:
    if isinstance(values[0], TextContext):
        return TextContext.collate(values)
    if isinstance(values[0], Tensor):
        return torch.cat([value.reshape(1) if value.ndim == 0 else value for value in values])
    return values[0]


def _form(one: Pass) -> Hashable:
    """What of a pass has to be equal."""
    return tuple((name, _form_of(value)) for name, value in sorted(one.items()))


def _form_of(value: Any) -> Hashable:
    value = value.raw if isinstance(value, TextContext) else value
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _size(clip: Denoising) -> int:
    return clip.video[:, 0].numel() + clip.audio[:, :, 0].numel()
