"""Segments of one clip: the repeated frame, the sound across a seam, and the last frame of a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from port_kit.clips import join_results, last_frame
from port_kit.clips.joining import join_frames, join_sound
from port_kit.pipeline.media import measure_mp4, write_mp4, write_result, write_wav
from tests.helpers import raises

FPS, RATE = 24, 16_000


def segment(start: int, *, samples: int = 8384, size: int = 32) -> Any:
    """Return a result of 13 frames that counts on from ``start``, with a ramp as its sound."""
    frames = np.stack([np.full((size, size, 3), start + index, np.uint8) for index in range(13)])
    ramp = start / FPS + np.arange(samples, dtype=np.float32) / RATE
    extra = {"fps": FPS, "audio": (ramp / 100)[None], "audio_sample_rate": RATE}
    return SimpleNamespace(images=[frames], multimodal_output=extra)


def test_the_repeated_frame_is_left_out_and_the_sound_continues() -> None:
    joined = join_results([segment(0), segment(12), segment(24)])
    assert joined.images[0][:, 0, 0, 0].tolist() == list(range(37))
    sound = joined.multimodal_output["audio"][0] * 100
    assert np.abs(sound - np.arange(len(sound)) / RATE).max() < 1e-4
    assert abs(len(sound) / RATE - 37 / FPS) < 1 / FPS


@pytest.mark.parametrize("samples", [8000, 8384, 8667, 9200])
def test_the_sound_of_any_segment_begins_at_its_repeated_frame(samples: int) -> None:
    sounds = [np.full(samples, value, np.float32) for value in (0.2, 0.6)]
    joined = join_sound(sounds, [13, 13], fps=FPS, rate=RATE)
    assert joined.shape == (8000 + samples,)
    assert (joined[:8000] == np.float32(0.2)).all() and np.allclose(joined[samples:], 0.6)
    between = joined[8000:samples]
    assert (np.diff(between) > 0).all() and ((between > 0.2) & (between < 0.6)).all()


def test_a_sound_that_ends_early_is_followed_by_silence() -> None:
    joined = join_sound([np.ones((2, 7000), np.float32)] * 2, [13, 13], fps=FPS, rate=RATE)
    assert joined.shape == (2, 15_000)
    assert (joined[:, :7000] == 1).all() and not joined[:, 7000:8000].any() and (joined[:, 8000:] == 1).all()


def test_one_result_and_videos_without_sound(tmp_path: Path) -> None:
    alone = segment(0)
    assert join_results([alone]) is alone
    silent = [SimpleNamespace(images=one.images, multimodal_output={"fps": FPS}) for one in (segment(0), segment(12))]
    (path,) = write_result(tmp_path / "a.mp4", join_results(silent))
    found = measure_mp4(path)
    assert (found.frames, found.audio_codec) == (25, "")


def test_a_joined_result_is_written_with_equal_lengths(tmp_path: Path) -> None:
    (path,) = write_result(tmp_path / "a.mp4", join_results([segment(0), segment(12), segment(24)]))
    found = measure_mp4(path)
    assert found.frames == 37
    assert abs(found.audio_seconds - found.video_seconds) <= 1 / FPS + 1024 / RATE, "AAC ends with a whole packet"


def test_segments_of_other_sizes_are_refused() -> None:
    with raises("input_size", "segment 2", "48x48", "32x32"):
        join_frames([segment(0).images[0], segment(12, size=48).images[0]])


def test_the_last_frame_is_that_of_the_file(tmp_path: Path) -> None:
    frames = segment(100).images[0]
    image = np.asarray(last_frame(write_mp4(tmp_path / "a.mp4", frames, fps=FPS))).astype(int)
    assert image.shape == (32, 32, 3) and np.abs(image - 112).max() <= 2
    with raises("media_write", "a.wav", "no frames"):
        last_frame(write_wav(tmp_path / "a.wav", np.zeros(99, np.float32), sample_rate=RATE))
