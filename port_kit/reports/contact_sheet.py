"""Contact sheet of a video with audio: frames in order and the waveform, decoded from the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.errors import InputError, OptionalDependencyError
from port_kit.escape import quoted, reason_of

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

FRAMES, COLUMNS = 8, 4
THUMB = 240  # pixels: width of a frame in the sheet
MARGIN, GAP, LINE, WAVE = 24, 8, 20, 150  # pixels
_BACK, _INK, _SOFT, _TRACE = (250, 250, 252), (32, 36, 44), (132, 138, 150), (64, 108, 190)
_CLIPPED = (190, 48, 48)


@dataclass(frozen=True)
class Clip:
    """Decoded content of a file: selected frames with their times, and the complete audio.

    Attributes:
        frames: uint8 (H, W, 3), with seconds from the start.
        count: frames in the file.
        fps: frames a second.
        samples: float32 (samples,), the mean of all channels; empty without audio.
        rate: Hz.
    """

    frames: list[tuple[float, np.ndarray]]
    count: int
    fps: float
    samples: np.ndarray
    rate: int

    @property
    def seconds(self) -> float:
        """Return the longer of the video's and the audio's duration."""
        return max(self.count / self.fps, len(self.samples) / self.rate if self.rate else 0.0)


def draw_contact_sheet(clip: Path | str, picture: Path | str, *, title: str = "") -> Path:
    """Draw a file's frames and its waveform into one PNG.

    Args:
        clip: a video file that FFmpeg reads, with or without audio.
        picture: the PNG; its folder is made.
        title: heading above the frames; the file's name if empty.

    Raises:
        InputError: ``media_write``: the file cannot be decoded, or has no frames.
        OptionalDependencyError: PyAV or Pillow is not installed.
    """
    found = read_clip(Path(clip))
    image = draw_clip(found, title or Path(clip).name)
    target = Path(picture)
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target, format="PNG", optimize=True)
    return target


def draw_overview(clips: Mapping[Path, str], picture: Path | str) -> Path:
    """Draw a row of frames of each video into one PNG, under its name and a text.

    Args:
        clips: texts by file.
        picture: the PNG; its folder is made.

    Raises:
        InputError: ``media_write``: a file cannot be decoded, or has no frames.
        OptionalDependencyError: PyAV or Pillow is not installed.
    """
    rows = [(f"{path.name}: {text}", read_clip(path)) for path, text in clips.items()]
    from PIL import Image, ImageDraw

    tall = [max(round(THUMB * clip.frames[0][1].shape[0] / clip.frames[0][1].shape[1]), 1) for _, clip in rows]
    wide = 2 * MARGIN + COLUMNS * THUMB + (COLUMNS - 1) * GAP
    image = Image.new("RGB", (wide, 2 * MARGIN + sum(tall) + len(rows) * (LINE + GAP)), _BACK)
    draw, top = ImageDraw.Draw(image), MARGIN
    for (title, clip), height in zip(rows, tall, strict=True):
        while len(title) > 1 and draw.textlength(title) > wide - 2 * MARGIN:
            title = f"{title.removesuffix('…')[:-1]}…"
        draw.text((MARGIN, top), title, fill=_INK)
        shown = clip.frames[:: max(1, math.ceil(len(clip.frames) / COLUMNS))]
        for column, (_, frame) in enumerate(shown):
            thumb = Image.fromarray(frame).resize((THUMB, height), Image.Resampling.LANCZOS)
            image.paste(thumb, (MARGIN + column * (THUMB + GAP), top + LINE))
        top += LINE + height + GAP
    target = Path(picture)
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target, format="PNG", optimize=True)
    return target


def read_clip(path: Path) -> Clip:
    """Decode a clip: the complete audio, and the frames that the sheet shows; see :func:`draw_contact_sheet`."""
    try:
        import av
        import numpy as np
    except ModuleNotFoundError as error:
        raise OptionalDependencyError(
            f"pictures of clips need the package {quoted(error.name)}, which is not installed",
            hint="install the runtime: pip install 'port-kit[omni]'",
        ) from error
    frames: list[tuple[float, np.ndarray]] = []
    sound: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} has no video stream", code="media_write")
            video = container.streams.video[0]
            audio = container.streams.audio[0] if container.streams.audio else None
            fps, rate = float(video.average_rate or 0) or math.nan, audio.rate if audio is not None else 0
            count, wanted = 0, _wanted(_count(path))
            for frame in container.decode(*([video, audio] if audio is not None else [video])):
                if isinstance(frame, av.VideoFrame):
                    if count in wanted:
                        frames.append((count / fps, frame.to_ndarray(format="rgb24")))
                    count += 1
                else:
                    sound.append(_mono(frame))
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path} cannot be decoded: {reason_of(error)}", code="media_write") from error
    if not frames:
        raise InputError(f"{path} has no frames", code="media_write")
    samples = np.concatenate(sound) if sound else np.empty(0, np.float32)
    return Clip(frames, count, fps, samples, rate)


def _count(path: Path) -> int:
    """Count frames by their packets, because containers may not say how many there are."""
    import av

    with av.open(str(path)) as container:
        return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))


def _wanted(count: int) -> set[int]:
    shown = min(FRAMES, count)
    return {round(index * (count - 1) / max(shown - 1, 1)) for index in range(shown)}


def _mono(frame: Any) -> np.ndarray:
    """Return a frame's samples (S,) as float32 in [-1, 1], whatever layout and type FFmpeg gave it."""
    import numpy as np

    values = frame.to_ndarray()
    if values.dtype.kind == "i":
        values = values / float(np.iinfo(values.dtype).max)
    channels = len(frame.layout.channels)
    planes = values if frame.format.is_planar else values.reshape(-1, channels).T
    return planes.mean(0).astype(np.float32)


def draw_clip(clip: Clip, title: str) -> Image:
    """Draw a decoded clip."""
    from PIL import Image, ImageDraw

    height, width = clip.frames[0][1].shape[:2]
    tall = max(round(THUMB * height / width), 1)
    columns = min(COLUMNS, len(clip.frames))
    rows = math.ceil(len(clip.frames) / columns)
    wide = 2 * MARGIN + columns * THUMB + (columns - 1) * GAP
    below = MARGIN + 2 * LINE + rows * (tall + LINE + GAP)
    image = Image.new("RGB", (wide, below + WAVE + 2 * LINE + MARGIN), _BACK)
    draw = ImageDraw.Draw(image)
    sound = f"{len(clip.samples) / clip.rate:.2f} s of sound at {clip.rate} Hz" if clip.rate else "no sound"
    draw.text((MARGIN, MARGIN), title, fill=_INK)
    draw.text(
        (MARGIN, MARGIN + LINE), f"{clip.count} frames, {width} x {height}, {clip.fps:g} fps; {sound}", fill=_SOFT
    )
    for index, (seconds, frame) in enumerate(clip.frames):
        x = MARGIN + index % columns * (THUMB + GAP)
        y = MARGIN + 2 * LINE + index // columns * (tall + LINE + GAP)
        image.paste(Image.fromarray(frame).resize((THUMB, tall), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + tall + 2), f"{seconds:.2f} s", fill=_SOFT)
    _draw_wave(draw, clip, (MARGIN, below, wide - MARGIN, below + WAVE))
    return image


def _draw_wave(draw: ImageDraw, clip: Clip, box: tuple[int, int, int, int]) -> None:
    """Draw the extremes of the samples of each column of pixels, full scale from edge to edge, and marks of seconds."""
    left, top, right, bottom = box
    middle, half = (top + bottom) / 2, (bottom - top) / 2
    draw.rectangle(box, outline=_SOFT)
    draw.line((left, middle, right, middle), fill=_SOFT)
    total = clip.seconds
    for second in range(math.floor(total) + 1):
        x = left + (right - left) * second / total
        draw.line((x, bottom, x, bottom + 4), fill=_SOFT)
        draw.text((x + 2, bottom + 4), f"{second} s", fill=_SOFT)
    if not clip.rate:
        draw.text((left + 8, top + 8), "no sound", fill=_SOFT)
        return
    peak = float(abs(clip.samples).max(initial=0.0))
    each = total * clip.rate / (right - left)
    for column in range(right - left):
        part = clip.samples[int(column * each) : max(int((column + 1) * each), int(column * each) + 1)]
        if len(part):
            high, low = (middle - half * min(max(float(value), -1.0), 1.0) for value in (part.max(), part.min()))
            draw.line((left + column, high, left + column, low), fill=_TRACE)
    clipped = int((abs(clip.samples) > 1.0).sum())
    text = f"waveform, from -1 to 1; largest sample {peak:.2f}"
    if clipped:
        text += f"; players clip {clipped} of {len(clip.samples)} samples"
    draw.text((left, bottom + LINE), text, fill=_CLIPPED if clipped else _SOFT)
