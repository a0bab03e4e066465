"""Token counts and seeded tensors of a case's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from port_kit.autoparallel.subject import ModelScale, TokenScale

#: Attention heads of the tiny configurations; 2 and 4 ranks divide them.
HEADS = 4
#: Query heads where a class has fewer key and value heads (:data:`HEADS`) than query heads.
QUERY_HEADS = 8
#: Channels per head.
HEAD_DIM = 16


class Sizes:
    """Sizes of a model: the tiny configuration times a :class:`ModelScale`."""

    def __init__(self, scale: ModelScale) -> None:
        self.depth = scale.depth
        self.width = scale.width
        self.heads = HEADS * scale.heads
        self.query_heads = QUERY_HEADS * scale.heads
        self.head_dim = HEAD_DIM * scale.width
        self.hidden = self.heads * self.head_dim

    def axes(self, *dims: int) -> tuple[int, ...]:
        """Return the rotary channels per axis, which sum to :data:`HEAD_DIM` at width 1."""
        return tuple(dim * self.width for dim in dims)


class Draw:
    """Token counts of a :class:`TokenScale`, and tensors from one seeded generator.

    Attributes:
        batch: samples.
        text: text tokens, 7 at first, so that ranks get unequal parts.
        frames: frames of a video.
        rows, columns: tokens of an image along each axis.
        image: tokens of an image.
        video: tokens of a video.
        audio: audio tokens.
    """

    def __init__(self, tokens: TokenScale, model: ModelScale) -> None:
        self.sizes = Sizes(model)
        self.masked = tokens.masked
        self.batch = 1 + tokens.batch
        self.text = 7 + 3 * tokens.text
        self.frames = 3
        self.rows = 4
        self.columns = 5 + tokens.image
        self.image = self.rows * self.columns
        self.video = self.frames * self.image
        self.audio = 9 + 4 * tokens.audio
        self._generator = torch.Generator().manual_seed(7)

    def normal(self, *shape: int) -> Tensor:
        """Return normal numbers of the shape ``(batch, *shape)``."""
        return self.table(self.batch, *shape)

    def table(self, *shape: int) -> Tensor:
        """Return normal numbers of a shape."""
        return torch.randn(shape, generator=self._generator)

    def integers(self, limit: int, *shape: int) -> Tensor:
        """Return integers of ``[0, limit)`` of the shape ``(batch, *shape)``."""
        return torch.randint(0, limit, (self.batch, *shape), generator=self._generator)

    def texts(self, channels: int) -> Tensor:
        """Return text embeddings, ``(batch, text, channels)``."""
        return self.normal(self.text, channels)

    def pixels(self, channels: int, patch: int = 2) -> Tensor:
        """Return image latents, ``(batch, channels, height, width)``."""
        return self.normal(channels, self.rows * patch, self.columns * patch)

    def square(self, channels: int, patch: int = 2) -> Tensor:
        """Return latents of a square image, ``(batch, channels, columns * patch, columns * patch)``."""
        return self.normal(channels, self.columns * patch, self.columns * patch)

    def clip(self, channels: int, patch: int = 2) -> Tensor:
        """Return video latents, ``(batch, channels, frames, height, width)``."""
        return self.normal(channels, self.frames, self.rows * patch, self.columns * patch)

    def times(self, scale: float = 1000.0) -> Tensor:
        """Return one timestep per sample, below ``scale``."""
        return scale * torch.linspace(0.75, 0.25, self.batch)

    def mask(self, length: int) -> Tensor:
        """Return a mask of keys, ``(batch, length)``: 1 is attended to; if masked, the last third and more is 0."""
        kept = [length - (length // 3 + row % 2 if self.masked else 0) for row in range(self.batch)]
        return (torch.arange(length) < torch.tensor(kept).unsqueeze(1)).long()

    def grid(self, frames: int | None = None) -> Tensor:
        """Return positions of image tokens, ``(image, 3)``, or of a video's, ``(frames * image, 3)``."""
        axes = [torch.arange(count) for count in (frames or 1, self.rows, self.columns)]
        return torch.cartesian_prod(*axes)

    def rotary(self, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of rotary positions, each ``(tokens, channels)``, equal in adjacent pairs."""
        angles = torch.arange(tokens).unsqueeze(1) / torch.logspace(0, 2, channels // 2)
        angles = angles.repeat_interleave(2, dim=1)
        return angles.cos(), angles.sin()
