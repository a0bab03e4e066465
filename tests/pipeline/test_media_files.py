"""Files of results: WAV from audio alone, and the suffixes of each modality."""

from __future__ import annotations

import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from port_kit.pipeline.media import describe_file, write_mp4, write_result, write_wav
from tests.helpers import raises

RATE = 8000


def read(path: Path) -> np.ndarray:
    """Return the samples (C, S) of a WAV file as floats."""
    with wave.open(str(path)) as file:
        assert (file.getsampwidth(), file.getframerate()) == (2, RATE)
        values = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        return values.reshape(-1, file.getnchannels()).T / 32767


def tone(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize(("shape", "channels"), [((50,), 1), ((1, 50), 1), ((2, 50), 2)])
def test_samples_survive(shape: tuple[int, ...], channels: int, tmp_path: Path) -> None:
    samples = tone(*shape)
    found = read(write_wav(tmp_path / "new" / "a.wav", samples, sample_rate=RATE))
    assert found.shape == (channels, 50)
    assert np.abs(found - samples.reshape(channels, 50)).max() <= 1 / 32767


@pytest.mark.parametrize("shape", [(3, 50), (1, 2, 50), (0,)])
def test_other_shapes_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with raises("media_write", str(shape)):
        write_wav(tmp_path / "a.wav", np.zeros(shape), sample_rate=RATE)


def test_a_missing_rate_is_refused(tmp_path: Path) -> None:
    with raises("media_write", "0 Hz"):
        write_wav(tmp_path / "a.wav", tone(50), sample_rate=0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    samples = tone(50)
    samples[7] = value
    with raises("media_write", "1 of 50"):
        write_wav(tmp_path / "a.wav", samples, sample_rate=RATE)
    with raises("media_write", "1 of 50"):
        write_mp4(tmp_path / "a.mp4", np.zeros((2, 32, 32, 3), np.uint8), samples, fps=8, sample_rate=RATE)
    assert list(tmp_path.iterdir()) == []


def test_clipping_is_stated(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"clipped 2 of 3 samples; peak 2\.00"):
        path = write_wav(tmp_path / "a.wav", np.array([0.0, 1.5, -2.0]), sample_rate=RATE)
    assert read(path).tolist() == [[0.0, 1.0, -1.0]]


def result(images: Any = (), **extra: Any) -> Any:
    return SimpleNamespace(images=list(images), multimodal_output=extra)


def test_a_result_of_audio_is_written_as_wav(tmp_path: Path) -> None:
    outputs = tone(2, 2, 400)
    paths = write_result(tmp_path / "rain.wav", result(audio=outputs, audio_sample_rate=RATE))
    assert [path.name for path in paths] == ["rain_1.wav", "rain_2.wav"]
    assert np.abs(read(paths[1]) - outputs[1]).max() <= 1 / 32767
    assert describe_file(paths[1]) == f"{paths[1]}: 0.05 s at 8000 Hz, stereo"


def test_a_video_may_have_stereo_audio(tmp_path: Path) -> None:
    frames = np.zeros((8, 32, 32, 3), np.uint8)
    given = result([frames], fps=8, audio=tone(2, RATE), audio_sample_rate=RATE)
    (path,) = write_result(tmp_path / "a.mp4", given)
    with av.open(str(path)) as file:
        assert len(file.streams.audio[0].layout.channels) == 2
        assert abs(sum(frame.samples for frame in file.decode(audio=0)) / RATE - 1) < 0.3


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("a.mp4", result(audio=tone(1, 1, 9), audio_sample_rate=RATE), "a.wav"),
        ("a.png", result([np.zeros((2, 32, 32, 3), np.uint8)], fps=8), "a.mp4"),
        ("a.wav", result([Image.new("RGB", (8, 8))]), "a.png"),
    ],
)
def test_the_suffix_of_another_modality_is_refused(name: str, given: Any, wanted: str, tmp_path: Path) -> None:
    with raises("media_write", name) as caught:
        write_result(tmp_path / name, given)
    assert str(caught.value.hint) == f"use {tmp_path / wanted}"
