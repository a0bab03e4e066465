"""From the output of a diffusers pipeline to vLLM-Omni's payload.

Shapes: N outputs, F frames, H height, W width, C color channels, A audio channels, S samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from port_kit.errors import InputError

#: Attributes, and entries of configurations, with a component's sample rate.
_RATES = ("sampling_rate", "sample_rate", "output_sampling_rate")

#: Key of the metadata with the work of rank 0; see :attr:`port_kit.autoparallel.host.pipeline.HostPipeline.work`.
WORK = "port_kit"


def extract(output: Any, pipeline: Any) -> dict[str, Any]:
    """Return the media of a pipeline's output as tensors on the CPU.

    Returns:
        ``image`` (N, H, W, C) or ``video`` (N, F, H, W, C), float in [0, 1]; ``audio`` (N, A, S), float in [-1, 1], and
        ``sample_rate`` in Hz. Latents stay as they are.

    Raises:
        InputError: ``media_write``; the output has other fields.
    """
    found: dict[str, Any] = {}
    fields = {"images": "image", "frames": "video", "audios": "audio", "audio": "audio"}
    for field, name in fields.items():
        if (value := getattr(output, field, None)) is not None:
            found[name] = _tensor(value)
    if not found:
        raise InputError(f"{type(output).__name__} has none of the fields {', '.join(fields)}", code="media_write")
    if "audio" in found:
        found["sample_rate"] = sample_rate(pipeline)
    return found


def sample_rate(pipeline: Any) -> int:
    """Return the sample rate in Hz that the pipeline, its vocoder or its audio VAE states.

    Raises:
        InputError: ``media_write``; none does.
    """
    parts = pipeline.components
    for owner in (pipeline, *(parts[name] for name in ("vocoder", "audio_vae", "vae") if parts.get(name) is not None)):
        for name in _RATES:
            value = getattr(owner, name, None) or getattr(getattr(owner, "config", None), name, None)
            if isinstance(value, int | float):
                return int(value)
    raise InputError(f"{type(pipeline).__name__} states no sample rate of its audio", code="media_write")


def payload(output: dict[str, Any], *, fps: float | None, output_type: str | None) -> dict[str, Any]:
    """Return vLLM-Omni's payload.

    Args:
        output: of :func:`extract`.
        fps: frames per second of a video, if the request gives it.
        output_type: ``np`` and ``latent`` leave values as floats; otherwise images are PIL images and frames uint8.
    """
    found: dict[str, Any] = {}
    as_float = output_type in ("np", "latent")
    if "image" in output:
        images = output["image"].numpy()
        found["image"] = list(images) if as_float else [_image(pixels) for pixels in images]
    if "video" in output:
        video = output["video"].numpy()
        found["video"] = list(video if as_float else _to_bytes(video))
    metadata: dict[str, Any] = {WORK: output[WORK]} if WORK in output else {}
    if "video" in output and fps:
        metadata["video"] = {"fps": fps}
    if "audio" in output:
        found["audio"] = output["audio"].numpy()
        metadata["audio"] = {"sample_rate": output["sample_rate"]}
    return {"payload": found, "metadata": metadata}


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().float().cpu()
    return torch.from_numpy(np.ascontiguousarray(value)).float()


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def _image(pixels: np.ndarray) -> Image.Image:
    levels = _to_bytes(pixels)
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
