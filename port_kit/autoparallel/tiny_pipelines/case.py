"""A tiny pipeline of diffusers with random weights: its components and one request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline that a test builds.

    Attributes:
        parts: return the components by name; called with a seeded generator.
        sampling: fields of ``OmniDiffusionSamplingParams``.
        arguments: further arguments of the pipeline's call.
        branches: calls of the transformer, or rows of a call, per step.
        prompt: empty for pipelines without one.
        negative: negative prompt; None for pipelines without one.
        image: pixels (height, width) of a reference image.
        frames: frames of a reference video of this size, in place of the image.
    """

    parts: Callable[[], dict[str, Any]]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    branches: int = 2
    prompt: str = "a red cat on a mat"
    negative: str | None = "blurry, low quality"
    image: tuple[int, int] | None = None
    frames: int = 0

    @property
    def inputs(self) -> str:
        """The kinds of input of the request, for reports."""
        text = ["text"] if self.prompt else []
        return " + ".join([*text, *self.media]) or "class"

    @property
    def media(self) -> dict[str, Any]:
        """The media of the request by kind."""
        if self.image is None:
            return {}
        if self.frames:
            return {"video": [gradient_image(*self.image, shift=8 * frame) for frame in range(self.frames)]}
        return {"image": gradient_image(*self.image)}

    def request(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the prompt of a request, and its sampling parameters."""
        prompt: dict[str, Any] = {"prompt": self.prompt}
        if self.negative is not None:
            prompt["negative_prompt"] = self.negative
        if self.media:
            prompt["multi_modal_data"] = self.media
        return prompt, {"seed": 3, "output_type": "np", "extra_args": dict(self.arguments), **self.sampling}


def gradient_image(height: int, width: int, shift: int = 0) -> Any:
    """Return an image without symmetries; another one for each shift."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, ((rows + columns) * 7 + shift) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def write_pipeline(name: str, case: TinyPipeline, folder: Path) -> Path:
    """Build a pipeline and save it as diffusers does; return the folder.

    Args:
        name: class name of the pipeline.
        case: its components.
        folder: is created.
    """
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = case.parts()
    for part, module in parts.items():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
            if part.startswith("transformer"):
                randomize(module)
    pipeline = getattr(diffusers, name)(**parts)
    pipeline.save_pretrained(str(folder))
    return folder


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Give every parameter seeded random values, so that no gate is closed."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(values * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(values * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
