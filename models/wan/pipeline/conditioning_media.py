"""Decoding of reference audio to the samples that the encoder accepts.

Shapes: S audio samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from port_kit.errors import InputError
from port_kit.escape import quoted, shortened
from port_kit.pipeline.inputs import check_real
from port_kit.references import MAX_AUDIO_RATE, MIN_AUDIO_RATE, check_samples, open_audio

SAMPLE_RATE = 16_000  # Hz, of the audio VAE
#: Part of a reference audio that is used, in seconds. It skips the first second, as the original does.
REFERENCE_AUDIO_START, REFERENCE_AUDIO_END = 1.0, 2.0
DECODED_SECONDS = 60  # of a reference audio; the rest is not looked at
#: Types of samples. Integers use their whole range; those of 64 bits hold other ranges, and would be silence.
SAMPLE_TYPES = ("int8", "int16", "int32", "float16", "float32", "float64")
#: Largest sample. Full scale is 1, which mixing and resampling may exceed; 16-bit integers as floats are beyond it.
MAX_AMPLITUDE = 16.0


def load_reference_audio(source: object, *, name: str = "audio") -> np.ndarray:
    """Return a reference audio as mono float32 samples (S,) at 16 kHz in [-1, 1].

    Args:
        source: a file as for :func:`~port_kit.references.check_audio`, ``(samples, rate)``, or samples at 16 kHz;
            samples are (S,) or (channels, S) of :data:`SAMPLE_TYPES` or bfloat16, as array or tensor.
        name: name in error messages.

    Raises:
        InputError: the audio is unreadable, has no audio track, has samples that are not finite or too large, or has an
            unsupported type.
    """
    if isinstance(source, (str, Path, bytes)) or hasattr(source, "read"):
        with open_audio(source, name=name) as (container, _):
            return _checked(_resample_track(container), name)
    samples, rate = source if isinstance(source, (tuple, list)) and len(source) == 2 else (source, SAMPLE_RATE)
    samples = _array(samples, name)
    whole = int(check_real(f"the sample rate of {name}", rate, minimum=MIN_AUDIO_RATE, maximum=MAX_AUDIO_RATE))
    if whole != rate:
        raise InputError(f"the sample rate of {name} is {quoted(rate)}; a whole number is required", code="input_value")
    check_samples(samples.shape[1] / whole, whole, samples.shape[0], name=name)
    return _mono_16k(_checked(_float_samples(samples[:, : whole * DECODED_SECONDS]), name), whole)


def _array(samples: Any, name: str) -> np.ndarray:
    """Return samples (channels, S) of one of :data:`SAMPLE_TYPES`, copied from bfloat16 only."""
    if not isinstance(samples, (np.ndarray, torch.Tensor)):
        raise InputError(
            f"{name} is {type(samples).__name__}; expected a path, bytes, (samples, rate) or samples at 16 kHz",
            code="input_type",
        )
    kind = str(samples.dtype).removeprefix("torch.")
    if isinstance(samples, torch.Tensor):
        if samples.layout is not torch.strided or samples.is_meta:
            raise InputError(f"{name} is a tensor without dense samples", code="input_type", hint="give a dense tensor")
        if samples.dtype is torch.bfloat16:
            kind, samples = "float32", samples.float()
    else:
        kind = samples.dtype.name  # without the order of bytes
    if samples.ndim not in (1, 2) or 0 in samples.shape or kind not in SAMPLE_TYPES:
        raise InputError(
            f"{name} is an array {shortened(kind)} {tuple(samples.shape)}; expected samples (S,) or (channels, S) "
            f"of one of {', '.join(SAMPLE_TYPES)}",
            code="input_type",
        )
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().resolve_neg().cpu().numpy()
    return np.atleast_2d(np.asarray(samples))


def _float_samples(samples: np.ndarray) -> np.ndarray:
    """Return (channels, S) float32; integers are scaled by the range of their type."""
    scale = 1.0 / -float(np.iinfo(samples.dtype).min) if samples.dtype.kind == "i" else 1.0
    with np.errstate(over="ignore"):  # the result is checked
        return samples.astype(np.float32) * np.float32(scale)


def _checked(samples: np.ndarray, name: str) -> np.ndarray:
    """Return samples of any shape, float32; files of floats may hold any number."""
    if not np.isfinite(samples).all():
        raise InputError(f"{name} has samples that are not finite", code="input_value")
    if samples.size and (peak := float(np.abs(samples).max())) > MAX_AMPLITUDE:
        raise InputError(
            f"{name} has a sample of size {peak:g}; full scale is 1, and at most {MAX_AMPLITUDE:g} is accepted",
            code="input_value",
            hint="divide the samples by their full scale",
        )
    return samples


def _mono_16k(samples: np.ndarray, rate: int) -> np.ndarray:
    mono = np.ascontiguousarray(samples.mean(axis=0, keepdims=True))
    if rate == SAMPLE_RATE:
        return mono[0]
    frame = av.AudioFrame.from_ndarray(mono, format="fltp", layout="mono")
    frame.sample_rate = rate
    resampler = _resampler()
    return _join([*resampler.resample(frame), *resampler.resample(None)])


def _resample_track(container: av.container.InputContainer) -> np.ndarray:
    """Decode at most ``DECODED_SECONDS`` of the first audio track."""
    resampler = _resampler()
    frames: list[av.AudioFrame] = []
    seconds = 0.0
    for frame in container.decode(container.streams.audio[0]):
        frames += resampler.resample(frame)
        seconds += frame.samples / frame.sample_rate
        if seconds >= DECODED_SECONDS:
            break
    return _join([*frames, *resampler.resample(None)])


def _resampler() -> av.AudioResampler:
    return av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)


def _join(frames: list[av.AudioFrame]) -> np.ndarray:
    parts = [frame.to_ndarray()[0] for frame in frames]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def crop_reference_audio(samples: np.ndarray, *, name: str = "audio") -> torch.Tensor:
    """Return seconds 1 to 2 of a reference audio, float32 (S=16000,).

    Raises:
        InputError: the reference audio is too short.
    """
    start, end = int(REFERENCE_AUDIO_START * SAMPLE_RATE), int(REFERENCE_AUDIO_END * SAMPLE_RATE)
    if len(samples) < end:
        raise InputError(
            f"{name} lasts {len(samples) / SAMPLE_RATE:.2f} s; at least {REFERENCE_AUDIO_END:g} s are required",
            code="input_too_short",
            hint=f"seconds {REFERENCE_AUDIO_START:g} to {REFERENCE_AUDIO_END:g} are used; give a longer clip",
        )
    return torch.from_numpy(np.ascontiguousarray(samples[start:end]))
