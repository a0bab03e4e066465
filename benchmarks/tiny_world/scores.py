"""Scores of clips of the world against their descriptions, from pixels and samples alone.

Shapes: B clips, F frames, H x W pixels, S samples. Nothing here is learned: a colour is the nearest of the palette, a
shape the template of largest overlap, bounces are the lowest points of the path, onsets are rises of the loudness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.tiny_world.clips import BACKGROUND, FPS, RATE, World, coverage
from benchmarks.tiny_world.grammar import DIRECTIONS, PALETTE, PITCHES, SHAPES, TEMPI, Description

#: Largest distance of a bounce and its onset, in frames of 1/24 s.
TOLERANCE = 2.5
#: Bounces and onsets nearer to the ends of a clip than this many frames are not counted.
EDGE = 3.0

_FAR = 0.3  # distance from the background from which a pixel belongs to the shape, RGB in 0..1
_STILL = 0.2  # pixels per frame
_HOP, _WINDOW, _SPAN = 128, 256, 4  # samples, samples, hops on each side of a rise
_RISE = 0.4  # powers of ten of the amplitude
_QUIET = 0.03  # amplitudes below this part of the loudest are silence
_LOWEST_HZ, _HIGHEST_HZ = 180.0, 1800.0


@dataclass(frozen=True)
class Measured:
    """Properties measured in one clip.

    Attributes:
        bounces: frames.
        onsets: frames.
    """

    colour: str
    shape: str
    tempo: str
    direction: str
    pitch: str
    bounces: tuple[float, ...]
    onsets: tuple[float, ...]

    def in_time(self) -> bool:
        """Return True if every bounce has its onset and every onset its bounce."""
        if not self.bounces or len(self.bounces) != len(self.onsets):
            return False
        pairs = zip(self.bounces, self.onsets, strict=True)
        return all(abs(bounce - onset) <= TOLERANCE for bounce, onset in pairs)


#: Names of the scores.
SCORES = ("colour", "shape", "tempo", "direction", "pitch", "in_time")


def measure(pixels: Tensor, wave: Tensor) -> list[Measured]:
    """Return what clips show: pixels ``[B, 3, F, H, W]`` in [-1, 1], sound ``[B, S]``."""
    rgb = (pixels.float() + 1) / 2
    far = (rgb - BACKGROUND).square().sum(1).sqrt()
    mask = (far > _FAR).float()
    area = mask.sum((2, 3))
    world = World(pixels.device)
    across = (mask * world.columns).sum((2, 3)) / area.clamp(min=1)
    down = (mask * world.rows).sum((2, 3)) / area.clamp(min=1)
    seen = area > 20
    colours = _colours(rgb, mask, world)
    shapes = _shapes(mask, across, down, seen, world)
    directions = _directions(across, seen)
    pitches = _pitches(wave.float())
    found = []
    for index in range(len(pixels)):
        bounces = _bounces(down[index].tolist(), seen[index].tolist())
        onsets = _onsets(wave[index].float(), len(seen[index]))
        found.append(
            Measured(
                list(PALETTE)[colours[index]],
                SHAPES[shapes[index]],
                _tempo(bounces),
                list(DIRECTIONS)[directions[index]],
                list(PITCHES)[pitches[index]],
                bounces,
                onsets,
            )
        )
    return found


def score(pixels: Tensor, wave: Tensor, given: Sequence[Description]) -> dict[str, float]:
    """Return the share of clips whose measurement is what their description says, by :data:`SCORES`."""
    return share(measure(pixels, wave), given)


def share(found: Sequence[Measured], given: Sequence[Description]) -> dict[str, float]:
    """Return the share of measurements that agree with their descriptions, by :data:`SCORES`."""
    hits = {name: 0.0 for name in SCORES}
    for one, description in zip(found, given, strict=True):
        for name in SCORES[:-1]:
            hits[name] += getattr(one, name) == getattr(description, name)
        hits["in_time"] += one.in_time()
    return {name: count / max(1, len(given)) for name, count in hits.items()}


def _colours(rgb: Tensor, mask: Tensor, world: World) -> list[int]:
    core = 1 - F.max_pool2d(1 - mask, 5, 1, 2)  # without the blended edge
    core = torch.where(core.sum((1, 2, 3), keepdim=True) > 0, core, mask)[:, None]
    mean = (rgb * core).sum((2, 3, 4)) / core.sum((2, 3, 4)).clamp(min=1)
    return torch.cdist(mean, world.palette).argmin(1).tolist()


def _shapes(mask: Tensor, across: Tensor, down: Tensor, seen: Tensor, world: World) -> list[int]:
    """Return the shape whose outline at the centroid overlaps the mask most, summed over the frames."""
    overlaps = []
    for index in range(len(SHAPES)):
        # the centroid of the triangle is a third of its height above its base, that of the others their centre
        offset = 12.0 - 26.0 / 3 if SHAPES[index] == "triangle" else 0.0
        x, y = world.columns - across[..., None, None], world.rows - (down - offset)[..., None, None]
        template = (coverage(x, y, torch.full((), index, device=mask.device)) > 0.5).float()
        both = (template * mask).sum((2, 3))
        union = torch.maximum(template, mask).sum((2, 3)).clamp(min=1)
        overlaps.append((both / union * seen).sum(1))
    return torch.stack(overlaps, 1).argmax(1).tolist()


def _directions(across: Tensor, seen: Tensor) -> list[int]:
    """Return the direction of the least-squares slope of the path."""
    weight = seen.float()
    time = torch.arange(across.shape[1], device=across.device, dtype=torch.float32)[None]
    total = weight.sum(1, keepdim=True).clamp(min=1)
    t = time - (weight * time).sum(1, keepdim=True) / total
    x = across - (weight * across).sum(1, keepdim=True) / total
    slope = (weight * t * x).sum(1) / (weight * t * t).sum(1).clamp(min=1e-6)
    return (1 + (slope > _STILL).long() - (slope < -_STILL).long()).tolist()


def _bounces(down: list[float], seen: list[bool]) -> tuple[float, ...]:
    """Return the frames of the lowest points of a path, with a fraction where its two sides meet."""
    heights = [y for y, visible in zip(down, seen, strict=True) if visible]
    if len(heights) < len(down) // 2 or max(heights) - min(heights) < 8:
        return ()
    level = min(heights) + 0.7 * (max(heights) - min(heights))
    found: list[float] = []
    for i in range(3, len(down) - 3):
        around = down[i - 3 : i + 4]
        if not all(seen[i - 3 : i + 4]) or down[i] < level or down[i] < max(around):
            continue
        if found and i - found[-1] < 10:
            continue
        left, right = down[i - 1] - down[i - 2], down[i + 1] - down[i + 2]
        spread = left + right
        shift = (down[i + 1] - down[i - 1]) / spread if spread > 0.5 else 0.0
        found.append(i + max(-0.5, min(0.5, shift)))
    return tuple(frame for frame in found if EDGE <= frame <= len(down) - 1 - EDGE)


def _tempo(bounces: Sequence[float]) -> str:
    if len(bounces) < 2:
        return ""
    steps = sorted(after - before for before, after in zip(bounces, bounces[1:], strict=False))
    middle = steps[len(steps) // 2]
    return min(TEMPI, key=lambda name: abs(TEMPI[name] - middle))


def _pitches(wave: Tensor) -> list[int]:
    """Return the pitch nearest to the strongest frequency, on a logarithmic scale."""
    power = torch.fft.rfft(wave).abs().square()
    hertz = torch.fft.rfftfreq(wave.shape[1], 1 / RATE).to(wave.device)
    inside = (hertz > _LOWEST_HZ) & (hertz < _HIGHEST_HZ)
    strongest = hertz[(power * inside).argmax(1)].clamp(min=1.0)
    names = torch.tensor(list(PITCHES.values()), device=wave.device)
    return (strongest.log()[:, None] - names.log()[None]).abs().argmin(1).tolist()


def _onsets(wave: Tensor, frames: int) -> tuple[float, ...]:
    """Return the frames at which the loudness rises steeply."""
    energy = F.avg_pool1d(F.pad(wave.square()[None, None], (_WINDOW // 2, _WINDOW // 2)), _WINDOW, _HOP)[0, 0]
    loud = energy.sqrt()
    level = torch.log10(loud.clamp(min=float(loud.max()) * _QUIET + 1e-9))
    padded = F.pad(level[None, None], (_SPAN, _SPAN), mode="replicate")[0, 0]
    rise = padded[2 * _SPAN :] - padded[: -2 * _SPAN]
    found: list[float] = []
    values = rise.tolist()
    for i, value in enumerate(values):
        near = values[max(0, i - 12) : i + 13]
        if value < _RISE or value < max(near) or (found and i - found[-1] < 24):
            continue
        found.append(float(i))
    # the middle of the rise of the window is when a tone starts
    times = (i * _HOP / RATE * FPS for i in found)
    return tuple(time for time in times if EDGE <= time <= frames - 1 - EDGE)
