"""What leaves the pipeline: frames and samples, vLLM-Omni's output contract, and MP4 files.

Legend: B batch, C colour channels, F frames, H height, W width, S audio samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from port_kit.errors import InputError


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


def to_omni_payload(output: dict[str, torch.Tensor], *, fps: int, sample_rate: int) -> dict[str, Any]:
    """Put the worker's output into the form that vLLM-Omni's formatter and its video server read.

    Args:
        output: ``video`` uint8 (F, H, W, 3) and ``audio`` float (S,), or several of both along a first axis.
        fps: frames a second.
        sample_rate: Hz.
    """
    video: np.ndarray = _array(output["video"])
    audio: np.ndarray = _array(output["audio"]).astype(np.float32)
    # Several videos are a list, and each is then one of the result's images; their audios stay one array.
    return {
        "payload": {"video": list(video) if video.ndim == 5 else video, "audio": audio},
        "metadata": {"video": {"fps": fps}, "audio": {"sample_rate": sample_rate}},
    }


def _array(value: torch.Tensor | np.ndarray) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def write_mp4(path: Path | str, frames: np.ndarray, samples: np.ndarray, *, fps: float, sample_rate: int) -> Path:
    """Write H.264 video with AAC audio, with vLLM-Omni's own encoder (the one behind ``/v1/videos``).

    Args:
        path: the file; its folder is made.
        frames: uint8 (F, H, W, 3).
        samples: float (S,) in [-1, 1].
        fps: frames a second.
        sample_rate: Hz.
    """
    from vllm_omni.diffusion.utils.media_utils import mux_video_audio_bytes

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        found = f"{frames.dtype} {frames.shape}"
        raise InputError(f"frames are {found}; uint8 (F, H, W, 3) is required", code="media_write")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = np.clip(np.asarray(samples, dtype=np.float32).reshape(-1), -1.0, 1.0)
    path.write_bytes(mux_video_audio_bytes(np.ascontiguousarray(frames), audio, fps=fps, audio_sample_rate=sample_rate))
    return path


def write_result(path: Path | str, result: Any) -> list[Path]:
    """Write every video of one of ``Omni``'s results: to ``path``, or with ``_1``, ``_2``, ... before its suffix.

    Args:
        path: the file, or the pattern of several.
        result: of a request to a port that gives videos with audio.
    """
    extra, path = result.multimodal_output, Path(path)
    rate, fps = int(extra["audio_sample_rate"]), float(extra["fps"])
    audios = np.asarray(extra["audio"])
    if len(result.images) == 1:
        return [write_mp4(path, result.images[0], audios, fps=fps, sample_rate=rate)]
    return [
        write_mp4(path.with_stem(f"{path.stem}_{i}"), video, audio, fps=fps, sample_rate=rate)
        for i, (video, audio) in enumerate(zip(result.images, audios, strict=True), 1)
    ]


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds, measured by decoding it.

    Attributes:
        frames: decoded frames.
        fps: frames a second.
        height, width: pixels.
        video_codec, audio_codec: FFmpeg's names (``h264``, ``aac``).
        sample_rate: Hz.
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
        return (
            f"{path}: {self.frames} frames {self.width}x{self.height} at {self.fps:g} fps "
            f"({self.video_codec}, {self.video_seconds:.2f} s), audio at {self.sample_rate} Hz "
            f"({self.audio_codec}, {self.audio_seconds:.2f} s, peak {self.peak:.2f})"
        )


def measure_mp4(path: Path | str) -> MediaInfo:
    """Decode a file completely and say what is in it.

    Raises:
        InputError: not readable, or one of the two streams is missing.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video or not container.streams.audio:
                raise InputError(f"{path} lacks a video or an audio stream", code="media_write")
            return _measure(container)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}", code="media_write") from error


def _measure(container: av.container.InputContainer) -> MediaInfo:
    video, audio = container.streams.video[0], container.streams.audio[0]
    frames, samples, peak = 0, 0, 0.0
    for frame in container.decode(video, audio):
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
        audio_codec=audio.codec_context.name,
        sample_rate=audio.rate,
        video_seconds=frames / fps,
        audio_seconds=samples / audio.rate,
        peak=peak,
    )
