"""Reference images as tensors: decoding, and three ways of fitting them to a size.

Shapes: C color channels, H height, W width.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from port_kit.references import check_image, to_rgb

_WHITE = (255, 255, 255)


def load_image(source: object, *, name: str = "image") -> Image.Image:
    """Return a reference image in RGB.

    Args:
        source: as for :func:`~port_kit.references.check_image`.
        name: name in error messages.

    Raises:
        InputError: the image is unreadable, corrupt, too large or of an unsupported type.
    """
    return to_rgb(check_image(source, name=name), name=name)  # a lazily opened file is decoded here


def fit_image(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """Fit an image into ``height`` x ``width`` with its aspect ratio, centered on white.

    Returns:
        float32 (C=3, H, W) in [-1, 1].
    """
    scale = min(height / image.height, width / image.width)
    # rounded down as in the original; at least one pixel remains
    inner = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    canvas = Image.new("RGB", (width, height), _WHITE)
    resized = image.resize(inner, Image.Resampling.LANCZOS)
    canvas.paste(resized, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    pixels = torch.from_numpy(np.asarray(canvas, dtype=np.float32).copy())
    return (pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def crop_image(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """Crop the center of an image to an aspect ratio, and resize it by Pillow's bicubic filter.

    Returns:
        float32 (C=3, ``height``, ``width``) in [-1, 1].
    """
    # the long side and the offset are rounded down, as in the original; at least one pixel remains
    inner = image.width, max(1, int(image.width / width * height))
    if image.height / image.width < height / width:
        inner = max(1, int(image.height / height * width)), image.height
    left, top = (image.width - inner[0]) // 2, (image.height - inner[1]) // 2
    cropped = image.crop((left, top, left + inner[0], top + inner[1]))
    resized = cropped.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255.0)
    return pixels.mul_(2.0).sub_(1.0).permute(2, 0, 1).contiguous()


def resize_image(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """Resize an image without keeping its aspect ratio, by bicubic interpolation without low-pass filter.

    Returns:
        float32 (C=3, H, W), nominally in [-1, 1]; interpolation may overshoot.
    """
    # One channel at a time: the picture may be far larger than the result.
    return torch.cat([_resize_channel(channel, height, width) for channel in image.split()])


def _resize_channel(channel: Image.Image, height: int, width: int) -> torch.Tensor:
    """Return float32 (1, ``height``, ``width``), nominally in [-1, 1]."""
    pixels = torch.from_numpy(np.asarray(channel, dtype=np.float32) / 255.0).mul_(2.0).sub_(1.0)
    if pixels.shape == (height, width):
        return pixels[None]
    return F.interpolate(pixels[None, None], size=(height, width), mode="bicubic", align_corners=False)[0]
