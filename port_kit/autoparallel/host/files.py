"""Files of a hosted pipeline's results: PNG, MP4 or WAV."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from port_kit.errors import InputError
from port_kit.pipeline.media import write_wav

#: Suffix of the files by modality.
SUFFIXES = {"image": ".png", "video": ".mp4", "audio": ".wav"}


def write_files(path: Path, result: Any, modality: str) -> list[Path]:
    """Write the outputs of one result: to ``path``, or with ``_1``, ``_2``, ... before its suffix if there are several.

    Args:
        path: its suffix must be that of :data:`SUFFIXES`.
        result: of ``Omni.generate``.
        modality: ``image``, ``video`` or ``audio``.

    Raises:
        InputError: ``media_write``; the suffix is another one.
    """
    if path.suffix != SUFFIXES[modality]:
        raise InputError(
            f"{path}: expected the suffix {SUFFIXES[modality]} for {modality}",
            code="media_write",
            hint=f"use -o {path.with_suffix(SUFFIXES[modality])}",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    writers = {"image": _images, "video": _videos, "audio": _audios}
    outputs = writers[modality](result)
    paths = [path] if len(outputs) == 1 else [path.with_stem(f"{path.stem}_{i}") for i in range(1, len(outputs) + 1)]
    for target, write in zip(paths, outputs, strict=True):
        write(target)
    return paths


def _images(result: Any) -> list[Callable[[Path], object]]:
    return [image.save for image in result.images]


def _videos(result: Any) -> list[Callable[[Path], object]]:
    from vllm_omni.diffusion.utils.media_utils import mux_video_audio_bytes

    extra = result.multimodal_output
    audios = extra.get("audio")
    fps = float(extra["fps"])

    def writer(index: int, frames: np.ndarray) -> Callable[[Path], object]:
        audio = None if audios is None else np.asarray(audios[index], dtype=np.float32).clip(-1, 1)
        rate = {} if audio is None else {"audio_sample_rate": int(extra["audio_sample_rate"])}
        return lambda path: path.write_bytes(
            mux_video_audio_bytes(np.ascontiguousarray(frames), audio, fps=fps, **rate)
        )

    return [writer(index, np.asarray(frames)) for index, frames in enumerate(result.images)]


def _audios(result: Any) -> list[Callable[[Path], object]]:
    extra = result.multimodal_output
    rate = int(extra["audio_sample_rate"])
    return [partial(write_wav, samples=samples, sample_rate=rate) for samples in extra["audio"]]
