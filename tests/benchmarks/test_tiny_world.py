"""Scores of the tiny world: all of the true clips, near chance on noise, and of a wrong clip only what differs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world() -> Iterator[Any]:
    """Import from the repository: benchmarks are not part of the package."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.tiny_world import clips, grammar, scores

        yield type("Modules", (), {"clips": clips, "grammar": grammar, "scores": scores})
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def truth(world: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Descriptions of every kind with their true clips."""
    given = [*world.grammar.held_back(16), *world.grammar.descriptions((world.grammar.NEW_COLOUR,))[::45]]
    drawn = world.clips.World()
    scenes = drawn.described(given, seed=3)
    return given, drawn.pixels(scenes)[0], drawn.wave(scenes)


@pytest.fixture(scope="module")
def measured(world: Any, truth: Any) -> Any:
    """What the true clips show."""
    return world.scores.measure(*truth[1:])


def test_true_clips_have_all_points(world: Any, truth: Any, measured: Any) -> None:
    given, pixels, wave = truth
    assert pixels.shape[1:] == (3, 121, 64, 96) and wave.shape[1:] == (80_384,)
    assert world.scores.share(measured, given) == dict.fromkeys(world.scores.SCORES, 1.0)


def test_blurred_and_noisy_clips_keep_their_points(world: Any, truth: Any) -> None:
    given, pixels, wave = truth
    generator = torch.Generator().manual_seed(1)
    blurred = torch.nn.functional.avg_pool3d(pixels, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    blurred = blurred + 0.05 * torch.randn(pixels.shape, generator=generator)
    hissing = wave + 0.003 * torch.randn(wave.shape, generator=generator)
    found = world.scores.score(blurred.clamp(-1, 1), hissing, given)
    assert min(found.values()) >= 0.95, found


def test_noise_is_near_chance(world: Any, truth: Any) -> None:
    given = truth[0]
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn((len(given), 3, 121, 64, 96), generator=generator).clamp(-1, 1)
    wave = 0.3 * torch.randn((len(given), 80_384), generator=generator)
    found = world.scores.score(pixels, wave, given)
    chance = {"colour": 1 / 7, "shape": 1 / 3, "tempo": 0, "direction": 1 / 3, "pitch": 1 / 5, "in_time": 0}
    assert all(abs(found[name] - share) < 0.25 for name, share in chance.items()), found


def test_sound_of_another_clip_is_not_in_time(world: Any, truth: Any) -> None:
    given, pixels, wave = truth
    found = world.scores.score(pixels, wave.roll(1, 0), given)
    assert found["in_time"] < 0.4 and found["colour"] == found["direction"] == 1.0


def test_a_wrong_word_costs_its_own_score(world: Any, truth: Any, measured: Any) -> None:
    given = truth[0]
    wrong = [replace(each, shape="ball" if each.shape == "box" else "box") for each in given]
    found = world.scores.share(measured, wrong)
    assert found["shape"] < 0.01 and found["colour"] == found["pitch"] == found["in_time"] == 1.0


def test_prompts_are_held_back(world: Any) -> None:
    grammar = world.grammar
    hidden, seen = set(grammar.held_back()), set(grammar.training())
    assert len(hidden) == 100 and len(seen) == 440 and not hidden & seen
    for field in ("colour", "shape", "tempo", "direction", "pitch"):
        assert {getattr(each, field) for each in seen} >= {getattr(each, field) for each in hidden}
    assert grammar.NEW_COLOUR in grammar.words()
