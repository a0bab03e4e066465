"""Prompts of the world: a colour, a shape, a tempo, a direction and a pitch, each named by one word or phrase."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass

#: Names and RGB values in 0..1.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.10, 0.10),
    "green": (0.10, 0.75, 0.10),
    "blue": (0.15, 0.20, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "magenta": (0.90, 0.10, 0.90),
    "cyan": (0.10, 0.90, 0.90),
}
#: A colour that no prompt of the base model's training has; a LoRA teaches it.
NEW_COLOUR = "white"
NEW_RGB = (0.95, 0.95, 0.95)
PALETTE = {**COLOURS, NEW_COLOUR: NEW_RGB}

SHAPES = ("ball", "box", "triangle")
#: Horizontal direction by phrase: -1, 0 or 1.
DIRECTIONS = {"to the left": -1, "on the spot": 0, "to the right": 1}
#: Frames from bounce to bounce.
TEMPI = {"slowly": 54, "quickly": 30}
#: Frequencies of the tones in Hz, about a fifth apart. They are multiples of the rate of mel frames, 62.5 Hz: a vocoder
#: of convolutions turns a steady spectrogram into a sound that repeats with every frame, so it makes no others.
PITCHES = {"deep": 250.0, "low": 375.0, "middle": 562.5, "high": 875.0, "shrill": 1312.5}

_TEMPLATES = (
    "A {colour} {shape} bounces {tempo} {direction}. Audio: a {pitch} tone at every bounce.",
    "The {colour} {shape} bounces {tempo} {direction}. Audio: the {pitch} tone of every bounce.",
)
HELD_BACK = 100
_SEED = 2026


@dataclass(frozen=True, order=True)
class Description:
    """Words of one clip.

    Attributes:
        colour: of :data:`PALETTE`.
        shape: of :data:`SHAPES`.
        tempo: of :data:`TEMPI`.
        direction: of :data:`DIRECTIONS`.
        pitch: of :data:`PITCHES`.
    """

    colour: str
    shape: str
    tempo: str
    direction: str
    pitch: str

    def prompt(self, template: int = 0) -> str:
        """Return the prompt."""
        return _TEMPLATES[template % len(_TEMPLATES)].format(**vars(self))


def descriptions(colours: tuple[str, ...] = tuple(COLOURS)) -> list[Description]:
    """Return all descriptions with these colours, in a fixed order."""
    return [Description(*words) for words in itertools.product(colours, SHAPES, TEMPI, DIRECTIONS, PITCHES)]


def held_back(count: int = HELD_BACK) -> list[Description]:
    """Return descriptions that no training has, in a fixed random order."""
    return random.Random(_SEED).sample(descriptions(), HELD_BACK)[:count]


def training() -> list[Description]:
    """Return the descriptions of the training."""
    hidden = set(held_back())
    return [each for each in descriptions() if each not in hidden]


def words() -> tuple[str, ...]:
    """Return every word of the prompts, sorted: pieces of the model's tokenizer."""
    texts = [each.prompt(template) for each in descriptions(tuple(PALETTE)) for template in range(len(_TEMPLATES))]
    return tuple(sorted({word for text in texts for word in re.findall(r"[A-Za-z]+", text)}))
