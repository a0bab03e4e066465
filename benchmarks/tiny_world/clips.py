"""Pixels and sound of the world, drawn in batches on any device without reading values back to the host.

Shapes: B clips, F frames, H x W pixels, S samples. A clip has Ovi's length: 121 frames at 24 fps, 80384 samples at
16 kHz. A shape falls and rises in parabolas; each touch of the ground starts a tone that decays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.tiny_world.grammar import DIRECTIONS, PALETTE, PITCHES, SHAPES, TEMPI, Description

HEIGHT, WIDTH, FRAMES, FPS = 64, 96, 121, 24
SAMPLES, RATE = 80_384, 16_000
BACKGROUND = 0.25
#: Height of the centre at a touch of the ground and how far it rises, in pixels.
GROUND, RISE = 48.0, 32.0
#: First touch, in frames: at least this, at most this before the end of a period.
MARGIN = 4.0
TRAVEL = 60.0  # pixels from the first frame to the last

_ATTACK, _DECAY, _LOUDNESS = 0.012, 0.22, 0.6  # seconds, seconds, amplitude
_HARMONIC = 0.25  # amplitude of the second harmonic


@dataclass(frozen=True)
class Scenes:
    """Clips to draw, one per entry of each tensor ``[B]``.

    Attributes:
        rgb: ``[B, 3]`` in 0..1.
        shape: index of :data:`~.grammar.SHAPES`.
        start: horizontal position of the centre at frame 0.
        speed: pixels per frame to the right.
        period: frames from touch to touch.
        first: frame of the first touch.
        hertz: frequency of the tone.
    """

    rgb: Tensor
    shape: Tensor
    start: Tensor
    speed: Tensor
    period: Tensor
    first: Tensor
    hertz: Tensor

    def __getitem__(self, part: slice) -> Scenes:
        return Scenes(*(value[part] for value in vars(self).values()))


class World:
    """Draws scenes; holds the constants on its device, so that drawing can be part of a CUDA graph."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        def constant(values: Sequence[object]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        self.device = torch.device(device)
        self.palette = constant(list(PALETTE.values()))
        self.periods = constant(list(TEMPI.values()))
        self.directions = constant(list(DIRECTIONS.values()))
        self.hertz = constant(list(PITCHES.values()))
        self.rows = torch.arange(HEIGHT, device=device, dtype=torch.float32)[:, None] + 0.5
        self.columns = torch.arange(WIDTH, device=device, dtype=torch.float32)[None] + 0.5

    def described(self, given: Sequence[Description], seed: int = 0) -> Scenes:
        """Return a scene of each description; what the words leave open is drawn with the seed."""
        names = [list(PALETTE), list(SHAPES), list(TEMPI), list(DIRECTIONS), list(PITCHES)]
        indices = [[row.index(word) for row, word in zip(names, vars(one).values(), strict=True)] for one in given]
        generator = torch.Generator().manual_seed(seed)
        free = torch.rand(3, len(given), generator=generator).to(self.device)
        return self._scenes(*torch.tensor(indices, device=self.device).unbind(1), free)

    def anything(self, count: int, pitches: Tensor | None = None) -> Scenes:
        """Return random scenes of all words, the new colour included.

        Args:
            count: of scenes.
            pitches: how often each pitch is drawn, relative to the others; equally often by default.
        """
        sizes = (len(PALETTE), len(SHAPES), len(TEMPI), len(DIRECTIONS), len(PITCHES))
        indices = [torch.randint(size, (count,), device=self.device) for size in sizes]
        if pitches is not None:  # torch.multinomial cannot be part of a CUDA graph
            bounds = (pitches / pitches.sum()).cumsum(0)[:-1].contiguous()
            indices[-1] = torch.searchsorted(bounds, torch.rand(count, device=self.device), right=True)
        return self._scenes(*indices, torch.rand(3, count, device=self.device))

    def _scenes(
        self, colour: Tensor, shape: Tensor, tempo: Tensor, direction: Tensor, pitch: Tensor, free: Tensor
    ) -> Scenes:
        period, side = self.periods[tempo], self.directions[direction]
        away = torch.where(side == 0, (free[1] - 0.5) * 36, -side * TRAVEL / 2 + (free[1] - 0.5) * 6)
        return Scenes(
            rgb=self.palette[colour],
            shape=shape,
            start=WIDTH / 2 + away,
            speed=side * TRAVEL / (FRAMES - 1),
            period=period,
            first=MARGIN + free[0] * (period - 2 * MARGIN),
            hertz=self.hertz[pitch],
        )

    def centres(self, scenes: Scenes, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return column and row of the centres ``[B, F]`` at frames ``[F]`` or ``[B, F]``."""
        phase = ((frames - scenes.first[:, None]) / scenes.period[:, None]) % 1.0
        down = GROUND - RISE * 4 * phase * (1 - phase)
        return scenes.start[:, None] + scenes.speed[:, None] * frames, down

    def pixels(self, scenes: Scenes, frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return pixels ``[B, 3, F, H, W]`` in [-1, 1] and the coverage by the shape ``[B, 1, F, H, W]``."""
        if frames is None:
            frames = torch.arange(FRAMES, device=self.device, dtype=torch.float32)
        across, down = self.centres(scenes, frames)
        x, y = self.columns - across[..., None, None], self.rows - down[..., None, None]
        cover = coverage(x, y, scenes.shape[:, None, None, None])[:, None]
        rgb = scenes.rgb[:, :, None, None, None]
        return (BACKGROUND + (rgb - BACKGROUND) * cover) * 2 - 1, cover

    def wave(self, scenes: Scenes, samples: int = SAMPLES, start: Tensor | None = None) -> Tensor:
        """Return sound ``[B, S]`` from the times ``start`` in seconds, by default the first frame's."""
        times = torch.arange(samples, device=self.device, dtype=torch.float32)[None] / RATE
        if start is not None:
            times = times + start[:, None]
        period, first = scenes.period[:, None] / FPS, scenes.first[:, None] / FPS
        tone = torch.zeros_like(times)
        number = torch.floor((times - first) / period)  # of the last touch; the one before it still sounds
        for back in (0, 1):
            since = times - first - (number - back) * period
            heard = (number - back >= 0).float()
            attack = 0.5 - 0.5 * torch.cos(math.pi * (since / _ATTACK).clamp(0, 1))
            angle = 2 * math.pi * scenes.hertz[:, None] * since
            shape = torch.sin(angle) + _HARMONIC * torch.sin(2 * angle)
            tone = tone + heard * attack * torch.exp(-since / _DECAY) * shape
        return _LOUDNESS * tone / (1 + _HARMONIC)


def coverage(x: Tensor, y: Tensor, shape: Tensor) -> Tensor:
    """Return the share of each pixel that a shape covers; ``x`` and ``y`` are relative to its centre."""
    ball = 12.0 - torch.sqrt(x.square() + y.square() + 1e-6)
    box = 11.0 - torch.maximum(x.abs(), y.abs())
    slope = math.hypot(26.0, 15.0)
    triangle = torch.minimum(12.0 - y, (15.0 * (y + 14.0) - 26.0 * x.abs()) / slope)
    inside = torch.where(shape == 0, ball, torch.where(shape == 1, box, triangle))
    return (inside + 0.5).clamp(0, 1)
