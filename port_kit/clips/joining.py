"""Several results as one clip, each of which begins with the last frame of the one before.

Legend: F frames, H height, W width, S audio samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.clips.settings import opened
from port_kit.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


@dataclass(frozen=True)
class Joined:
    """Part of a result of ``Omni.generate`` that writers of files read.

    Attributes:
        images: one array of frames, uint8 (F, H, W, 3).
        multimodal_output: ``fps``; with sound ``audio``, float (..., S), and ``audio_sample_rate``.
    """

    images: list[np.ndarray]
    multimodal_output: Mapping[str, Any]


def join_results(results: Sequence[Any]) -> Any:
    """Return the results of a clip's segments as one result; each has one video.

    Raises:
        InputError: ``input_size``; the segments differ in size.
    """
    import numpy as np

    if len(results) == 1:
        return results[0]
    videos = [np.asarray(result.images[0]) for result in results]
    outputs = [result.multimodal_output for result in results]
    joined = dict(outputs[0])
    if "audio" in joined:
        lengths = [len(video) for video in videos]
        sounds = [np.asarray(output["audio"], dtype=np.float32) for output in outputs]
        joined["audio"] = join_sound(sounds, lengths, fps=joined["fps"], rate=joined["audio_sample_rate"])
    return Joined([join_frames(videos)], joined)


def join_frames(videos: Sequence[np.ndarray]) -> np.ndarray:
    """Join frames (F, H, W, 3); the first frame of a segment repeats the last of the one before, and is left out.

    Raises:
        InputError: ``input_size``; the segments differ in size.
    """
    import numpy as np

    sizes = [video.shape[1:3] for video in videos]
    if other := [index for index, size in enumerate(sizes) if size != sizes[0]]:
        (height, width), (found_height, found_width) = sizes[0], sizes[other[0]]
        raise InputError(
            f"segment {other[0] + 1} has {found_width}x{found_height} pixels; the first has {width}x{height}",
            code="input_size",
            hint="use a size that the model keeps for an image of that size",
        )
    return np.concatenate([videos[0], *(video[1:] for video in videos[1:])])


def join_sound(sounds: Sequence[np.ndarray], frames: Sequence[int], *, fps: float, rate: int) -> np.ndarray:
    """Place each segment's sound where its repeated frame is; where two overlap, one fades into the other.

    Args:
        sounds: float32 (..., S) of each segment; a sound that ends early is followed by silence.
        frames: number of frames of each segment.
        fps: frames per second.
        rate: Hz.

    Returns:
        float32 (..., S), from the first sound's beginning to the last one's end.
    """
    import numpy as np

    starts = [round(sum(count - 1 for count in frames[:index]) / fps * rate) for index in range(len(sounds))]
    ends = [start + sound.shape[-1] for start, sound in zip(starts, sounds, strict=True)]
    joined = np.zeros((*sounds[0].shape[:-1], max(ends)), np.float32)
    filled = 0
    for start, end, sound in zip(starts, ends, sounds, strict=True):
        shared = min(max(filled - start, 0), sound.shape[-1])
        gain = np.ones(sound.shape[-1], np.float32)
        gain[:shared] = (np.arange(shared) + 1) / (shared + 1)
        joined[..., start : start + shared] *= 1 - gain[:shared]
        joined[..., start:end] += sound * gain
        filled = max(filled, end)
    return joined


def last_frame(path: Path) -> Image:
    """Return the last frame of a video file.

    Raises:
        InputError: ``media_write``; it cannot be decoded, or has no frames.
    """
    with opened(path) as container:
        last = deque(container.decode(video=0) if container.streams.video else (), maxlen=1)
    if not last:
        raise InputError(
            f"{path} has no frames; the last frame of a video is required",
            code="media_write",
            hint="give a video, such as an MP4",
        )
    image: Image = last[0].to_image()
    return image
