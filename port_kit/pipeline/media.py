"""Output of a pipeline: frames and samples, vLLM-Omni's output contract, and MP4, WAV and image files.

Legend: B batch, N outputs, C channels of colour or of audio, F frames, H height, W width, S audio samples.
"""

from __future__ import annotations

import math
import warnings
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from port_kit.errors import InputError
from port_kit.escape import reason_of

#: Suffix of files with sound alone and with frames; the suffix of an image chooses its format.
AUDIO_SUFFIX, VIDEO_SUFFIX = ".wav", ".mp4"


def to_frames(video: torch.Tensor) -> torch.Tensor:
    """Turn pixels (1, 3, F, H, W) in [-1, 1] into uint8 frames (F, H, W, 3), on the same device.

    A frame is made at a time: the whole clip in float32 would take four times the memory of its frames again.
    """
    _, _, frames, height, width = video.shape
    result = torch.empty(frames, height, width, 3, dtype=torch.uint8, device=video.device)
    for index in range(frames):
        pixels = video[0, :, index].float().clamp(-1.0, 1.0)
        result[index] = ((pixels + 1.0) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    return result


def to_omni_payload(output: Mapping[str, torch.Tensor], *, fps: int, sample_rate: int) -> dict[str, Any]:
    """Put the worker's output into the form that vLLM-Omni's formatter and its servers read.

    Args:
        output: any of ``video`` uint8 (F, H, W, 3), ``audio`` float (S,) or (C, S), and ``image`` uint8 (H, W, 3), or
            several of each along a first axis; ``audio`` alone is (N, C, S).
        fps: frames a second.
        sample_rate: Hz.
    """
    payload: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    for kind, value in output.items():
        array: np.ndarray = _array(value)
        if kind == "video":
            # Several videos are a list, and each is then one of the result's images; their audios stay one array.
            payload[kind] = list(array) if array.ndim == 5 else array
            metadata[kind] = {"fps": fps}
        elif kind == "image":
            payload[kind] = [Image.fromarray(image) for image in (array if array.ndim == 4 else array[None])]
        else:
            payload[kind] = array.astype(np.float32)
            metadata[kind] = {"sample_rate": sample_rate}
    return {"payload": payload, "metadata": metadata}


def _array(value: torch.Tensor | np.ndarray) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def write_mp4(
    path: Path | str, frames: np.ndarray, samples: np.ndarray | None = None, *, fps: float, sample_rate: int = 0
) -> Path:
    """Write H.264 video with AAC audio, with vLLM-Omni's own encoder (the one behind ``/v1/videos``).

    Args:
        path: the file; its folder is made.
        frames: uint8 (F, H, W, 3).
        samples: float (S,) or (C, S) in [-1, 1]; None for a video without audio.
        fps: frames a second.
        sample_rate: Hz, of the samples.
    """
    from vllm_omni.diffusion.utils.media_utils import mux_video_audio_bytes

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        found = f"{frames.dtype} {frames.shape}"
        raise InputError(f"frames are {found}; uint8 (F, H, W, 3) is required", code="media_write")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"fps": fps}
    if samples is not None:
        options |= {"audio_waveform": _bounded(path, samples), "audio_sample_rate": sample_rate}
    path.write_bytes(mux_video_audio_bytes(np.ascontiguousarray(frames), **options))
    return path


def write_wav(path: Path | str, samples: np.ndarray, *, sample_rate: int) -> Path:
    """Write 16-bit PCM. Samples beyond [-1, 1] are clipped, with a warning that counts them.

    Args:
        path: the file; its folder is made.
        samples: float (S,), or (C, S) with one or two channels.
        sample_rate: Hz.

    Raises:
        InputError: ``media_write``; another shape, no sample rate, or a sample that is not finite.
    """
    path, samples = Path(path), np.asarray(samples, dtype=np.float32)
    if samples.ndim not in (1, 2) or not samples.size or (samples.ndim == 2 and samples.shape[0] > 2):
        raise InputError(f"{path}: samples are {samples.shape}; (S,), (1, S) or (2, S) is required", code="media_write")
    if sample_rate <= 0:
        raise InputError(
            f"{path}: the sample rate is {sample_rate} Hz",
            code="media_write",
            hint="set audio_sample_rate of the pipeline class, in Hz",
        )
    bounded = _bounded(path, samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((bounded * 32767).round().astype("<i2").T.tobytes())
    return path


def _bounded(path: Path, samples: np.ndarray) -> np.ndarray:
    """Return float32 samples in [-1, 1]; refuse samples that are not finite, and warn of clipped ones."""
    samples = np.asarray(samples, dtype=np.float32)
    if not np.isfinite(samples).all():
        count = int((~np.isfinite(samples)).sum())
        raise InputError(f"{path.name}: {count} of {samples.size} samples are not finite", code="media_write")
    magnitude = np.abs(samples)
    if clipped := int((magnitude > 1.0).sum()):
        # not through logging: imports of vLLM set the level of the root logger to ERROR
        message = f"{path.name}: clipped {clipped} of {samples.size} samples; peak {magnitude.max():.2f}"
        warnings.warn(message, stacklevel=3)
    return samples.clip(-1.0, 1.0)


def write_result(path: Path | str, result: Any) -> list[Path]:
    """Write every output of one of ``Omni``'s results: to ``path``, or with ``_1``, ``_2``, ... before its suffix.

    Videos are MP4, with or without audio; audio alone is WAV; the suffix of an image chooses its format.

    Args:
        path: the file, or the pattern of several.
        result: of a request to a port.

    Raises:
        InputError: ``media_write``; the suffix is that of another modality, or the output cannot be written.
    """
    path, extra = Path(path), result.multimodal_output or {}
    if "fps" in extra:
        return _write_videos(_targets(path, len(result.images), VIDEO_SUFFIX), result.images, extra)
    if "audio" in extra:
        outputs, rate = np.atleast_2d(np.asarray(extra["audio"])), int(extra.get("audio_sample_rate") or 0)
        targets = _targets(path, len(outputs), AUDIO_SUFFIX)
        return [write_wav(target, one, sample_rate=rate) for target, one in zip(targets, outputs, strict=True)]
    targets = _targets(path, len(result.images), "")
    return [_write_image(target, image) for target, image in zip(targets, result.images, strict=True)]


def _targets(path: Path, count: int, suffix: str) -> list[Path]:
    """Return the files of several outputs; refuse the suffix of another modality."""
    if path.suffix != suffix if suffix else path.suffix in (AUDIO_SUFFIX, VIDEO_SUFFIX):
        wanted = suffix or ".png"
        raise InputError(
            f"{path}: the output needs the suffix {wanted}",
            code="media_write",
            hint=f"use {path.with_suffix(wanted)}",
        )
    return [path] if count == 1 else [path.with_stem(f"{path.stem}_{i}") for i in range(1, count + 1)]


def _write_videos(targets: Sequence[Path], videos: Sequence[Any], extra: Mapping[str, Any]) -> list[Path]:
    audios: Sequence[Any] = [None] * len(targets)
    if "audio" in extra:
        audios = [np.asarray(extra["audio"])] if len(targets) == 1 else np.asarray(extra["audio"])
    rate, fps = int(extra.get("audio_sample_rate", 0)), float(extra["fps"])
    return [
        write_mp4(target, np.asarray(video), audio, fps=fps, sample_rate=rate)
        for target, video, audio in zip(targets, videos, audios, strict=True)
    ]


def _write_image(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def describe_file(path: Path | str) -> str:
    """Return one line for people: the size of an image, the length of an audio, or what decoding a video gives."""
    if Path(path).suffix == VIDEO_SUFFIX:
        return measure_mp4(path).line(path)
    if Path(path).suffix == AUDIO_SUFFIX:
        with wave.open(str(path)) as file:
            channels = {1: "mono", 2: "stereo"}.get(file.getnchannels(), f"{file.getnchannels()} channels")
            return f"{path}: {file.getnframes() / file.getframerate():.2f} s at {file.getframerate()} Hz, {channels}"
    with Image.open(path) as image:
        return f"{path}: {image.width}x{image.height}"


@dataclass(frozen=True)
class MediaInfo:
    """Contents of a file, measured by decoding it.

    Attributes:
        frames: decoded frames.
        fps: frames a second.
        height, width: pixels.
        video_codec, audio_codec: FFmpeg's names (``h264``, ``aac``); ``audio_codec`` is empty without audio.
        sample_rate: Hz; 0 without audio.
        video_seconds: frames / fps.
        audio_seconds: decoded samples / sample rate.
        peak: largest absolute sample.
    """

    frames: int
    fps: float
    height: int
    width: int
    video_codec: str
    audio_codec: str
    sample_rate: int
    video_seconds: float
    audio_seconds: float
    peak: float

    def line(self, path: Path | str) -> str:
        """Return one line for people."""
        video = (
            f"{path}: {self.frames} frames {self.width}x{self.height} at {self.fps:g} fps "
            f"({self.video_codec}, {self.video_seconds:.2f} s)"
        )
        if not self.audio_codec:
            return video
        return (
            f"{video}, audio at {self.sample_rate} Hz "
            f"({self.audio_codec}, {self.audio_seconds:.2f} s, peak {self.peak:.2f})"
        )


def measure_mp4(path: Path | str) -> MediaInfo:
    """Decode a file completely and say what is in it.

    Raises:
        InputError: not readable, or without a video stream.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} has no video stream", code="media_write")
            return _measure(container)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}", code="media_write") from error


def _measure(container: av.container.InputContainer) -> MediaInfo:
    video, audio = container.streams.video[0], next(iter(container.streams.audio), None)
    frames, samples, peak = 0, 0, 0.0
    for frame in container.decode(video, *([audio] if audio else [])):
        if isinstance(frame, av.VideoFrame):
            frames += 1
        else:
            samples += frame.samples
            peak = max(peak, float(np.abs(frame.to_ndarray()).max(initial=0.0)))
    fps = float(video.average_rate or math.nan)
    return MediaInfo(
        frames=frames,
        fps=fps,
        height=video.height,
        width=video.width,
        video_codec=video.codec_context.name,
        audio_codec=audio.codec_context.name if audio else "",
        sample_rate=audio.rate if audio else 0,
        video_seconds=frames / fps,
        audio_seconds=samples / audio.rate if audio else 0.0,
        peak=peak,
    )
