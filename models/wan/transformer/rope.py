"""Rotary positions of a tower, as tables that can be sharded by token.

Shape suffixes: B batch, S tokens of a stream, N heads, H head dim, R = H/2 rotated pairs.

A table holds ``(cos, sin)`` of every token and pair, ``[1, S, R, 2]`` in float32. A pair that a position does not
rotate has ``(1, 0)``. Ovi and DreamID-Omni rotate only the leading part of each audio head, and this avoids a slice
and a copy of the rest. Tables depend on the geometry of a request only; :class:`RopeTables` caches recent ones.

Facts of the checkpoints' training, which fix the dtypes below:

* A head splits into temporal, vertical and horizontal parts. Audio uses the temporal part only in Ovi and DreamID-Omni,
  and the complete head in ``wan``.
* Ovi and Wan compute all angles in float64. DreamID-Omni computes temporal angles in float32, whose error at position
  760 is 1e-5; the model was trained with that error.
* Reference positions are absolute: image j is at frame ``150 * (j + 1)``; audio j starts at ``offset * (j + 1)``
  with the offset rounded by the dtype of the frequency scaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from port_kit.errors import InputError
from port_kit.models.wan.transformer.config import RopeConfig

THETA = 10000.0
#: Latent frames between the positions of consecutive references.
REFERENCE_STRIDE = 150
#: Number of geometries whose tables stay on the device. The branches of a request share one video and one audio
#: geometry.
KEPT_TABLES = 8


@dataclass(frozen=True)
class RopeTables:
    """Rotary tables for one architecture, cached by geometry.

    Attributes:
        config: family and frequency scaling.
        head_dim: width H of a head.
    """

    config: RopeConfig
    head_dim: int

    def table(self, grid: tuple[int, ...], device: torch.device | None = None) -> Tensor:
        """Return the table of a token grid without references: (frames, rows, columns) of video, (tokens,) of audio."""
        return self.audio(grid[0], device=device) if len(grid) == 1 else self.video(grid, device=device)

    def video(self, grid: tuple[int, ...], reference_frames: int = 0, device: torch.device | None = None) -> Tensor:
        """Return the table of video tokens in (frame, row, column) order, ``[1, F*H*W, R, 2]``.

        Args:
            grid: token counts (frames, rows, columns), references included.
            reference_frames: number of frames at the end that are references.
            device: of the table.

        Raises:
            InputError: there are more references than frames, or the family has no reference positions.
        """
        frames = _video_positions(grid[0], reference_frames, self.config)
        return _video_table(self, frames, grid[1:], device or torch.device("cpu"))

    def audio(self, length: int, reference_lengths: Sequence[int] = (), device: torch.device | None = None) -> Tensor:
        """Return the table of audio tokens, ``[1, length, R, 2]``.

        Args:
            length: tokens, references included.
            reference_lengths: number of tokens of each reference; references are the last tokens.
            device: of the table.

        Raises:
            InputError: references are longer than the sequence, or the family has no reference positions.
        """
        positions = _audio_positions(length, tuple(reference_lengths), self.config)
        return _audio_table(self, positions, device or torch.device("cpu"))

    @property
    def parts(self) -> tuple[int, int, int]:
        """Numbers of a head's dimensions that rotate with (frame, row, column)."""
        across = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * across, across, across


def rotate(x_BSNH: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent pairs of every head in float32 by a table ``[1, S, R, 2]``; return the dtype of ``x``."""
    cos, sin = table.unsqueeze(2).unbind(-1)
    even, odd = torch.unflatten(x_BSNH.float(), -1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x_BSNH.dtype)


def reference_offset(config: RopeConfig) -> int:
    """Return the audio position of the first reference, divided in the dtype of the scaling as in training."""
    return int(REFERENCE_STRIDE / _scaling(config))


def _scaling(config: RopeConfig) -> Tensor:
    return torch.tensor(config.freqs_scaling, dtype=getattr(torch, config.scaling_dtype), device="cpu")


def _video_positions(frames: int, references: int, config: RopeConfig) -> tuple[int, ...]:
    if not 0 <= references <= frames:
        raise InputError(f"{references} reference frames do not fit into {frames} frames", code="reference_length")
    _require_references(references, config)
    return (*range(frames - references), *(REFERENCE_STRIDE * (j + 1) for j in range(references)))


def _audio_positions(length: int, references: tuple[int, ...], config: RopeConfig) -> tuple[int, ...]:
    own = length - sum(references)
    if own < 0 or any(count < 0 for count in references):
        raise InputError(f"references of {references} audio tokens do not fit into {length}", code="reference_length")
    _require_references(len(references), config)
    offset = reference_offset(config)
    placed = (offset * (j + 1) + i for j, count in enumerate(references) for i in range(count))
    return (*range(own), *placed)


def _require_references(count: int, config: RopeConfig) -> None:
    if count and config.family != "dreamid_omni":
        raise InputError(f"rope family {config.family} has no positions for references", code="reference_length")


@lru_cache(maxsize=KEPT_TABLES)
def _video_table(rope: RopeTables, frames: tuple[int, ...], plane: tuple[int, ...], device: torch.device) -> Tensor:
    time, down, across = rope.parts
    dtype = _temporal_dtype(rope.config)
    angles = (
        _angles(torch.tensor(frames, device="cpu"), _frequencies(time, dtype))[:, None, None],
        _angles(torch.arange(plane[0], device="cpu"), _frequencies(down, torch.float64))[None, :, None],
        _angles(torch.arange(plane[1], device="cpu"), _frequencies(across, torch.float64))[None, None],
    )
    shape = (len(frames), *plane, -1)
    return _table(torch.cat([part.expand(shape) for part in angles], -1).flatten(0, 2), device)


@lru_cache(maxsize=KEPT_TABLES)
def _audio_table(rope: RopeTables, positions: tuple[int, ...], device: torch.device) -> Tensor:
    time = rope.head_dim if rope.config.family == "wan" else rope.parts[0]
    dtype = _temporal_dtype(rope.config)
    frequencies = _frequencies(time, dtype) * _scaling(rope.config)
    angles = _angles(torch.tensor(positions, device="cpu"), frequencies)
    return _table(torch.cat((angles, angles.new_zeros(len(positions), (rope.head_dim - time) // 2)), -1), device)


def _temporal_dtype(config: RopeConfig) -> torch.dtype:
    return torch.float32 if config.family == "dreamid_omni" else torch.float64


def _frequencies(dim: int, dtype: torch.dtype) -> Tensor:
    """Return ``theta ** (-2i / dim)`` for each pair, computed in ``dtype`` on the CPU, so that all ranks agree."""
    exponents = torch.arange(0, dim, 2, dtype=dtype, device="cpu") / dim
    return 1.0 / torch.pow(torch.tensor(THETA, dtype=dtype, device="cpu"), exponents)


def _angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Multiply in the dtype of the frequencies, then convert to float64 for an exact sine and cosine."""
    return torch.outer(positions.to(frequencies.dtype), frequencies).double()


def _table(angles_SR: Tensor, device: torch.device) -> Tensor:
    return torch.stack((angles_SR.cos(), angles_SR.sin()), -1).float()[None].to(device)
