"""Input and output adapters of a stream: latents to tokens, timesteps and texts to conditioning, tokens to latents.

Shape suffixes: B batch, C channels, F H W latent frames, rows, columns, V video tokens, A audio tokens, S either,
T text tokens, D width, G distinct timesteps.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm_omni.quantization.component_config import safe_quant_config

from port_kit.errors import InputError
from port_kit.models.wan.transformer import fused_ops
from port_kit.models.wan.transformer.layers import GatedConv, TextEmbedding, TimeEmbedding, TimeProjection, unfold1d
from port_kit.parallel import linear

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from port_kit.models.wan.transformer.config import FusionConfig


class TextContext:
    """A stream's text with a cache of its embedding and of its keys and values in each block.

    The cached tensors do not depend on the timestep. If all steps of a request pass the same object, the text is
    embedded once and projected once per block. The cache lives as long as this object.

    Args:
        raw: states of the text encoder, ``[B, T, text_dim]``, without padding.
    """

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw
        self.embedded: Tensor | None = None
        self.keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self.parts: tuple[TextContext, ...] = ()

    @property
    def batch_key(self) -> Hashable:
        """Shape and dtype. Texts in a batch are not padded and must have equal lengths."""
        return tuple(self.raw.shape), self.raw.dtype

    @classmethod
    def collate(cls, parts: Sequence[TextContext]) -> TextContext:
        """Return texts of equal length as one batch, in order; each part keeps its own cache."""
        text = cls(torch.cat([part.raw for part in parts]))
        text.parts = tuple(parts)
        return text


class VideoPatchEmbed(nn.Module):
    """Embedding of video latents: one linear per patch."""

    def __init__(self, config: FusionConfig, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.patch = config.patch_size
        # the input of the model is not quantized
        self.proj = linear.replicated(config.patch_dim, config.dim, safe_quant_config(quant), f"{prefix}.proj")

    def forward(self, latents_BCFHW: Tensor) -> Tensor:
        """Return ``[B, V, D]``, tokens in (frame, row, column) order."""
        f, h, w = self.grid(latents_BCFHW)
        down, across = self.patch[1:]
        patches = latents_BCFHW.unflatten(4, (w, across)).unflatten(3, (h, down)).unflatten(2, (f, self.patch[0]))
        return self.proj(patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3))

    def grid(self, latents_BCFHW: Tensor) -> tuple[int, int, int]:
        """Return the token counts (frames, rows, columns).

        Raises:
            InputError: the latents do not divide into patches.
        """
        sizes = latents_BCFHW.shape[2:]
        if any(size % step for size, step in zip(sizes, self.patch, strict=True)):
            raise InputError(
                f"video latents of {tuple(sizes)} do not divide into patches of {self.patch}", code="latent_size"
            )
        f, h, w = (size // step for size, step in zip(sizes, self.patch, strict=True))
        return f, h, w


class AudioPatchEmbed(nn.Module):
    """Embedding of audio latents: a convolution and a gated convolution along time."""

    def __init__(self, config: FusionConfig, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.kernel = config.audio_kernel
        # 140 inputs: eight-bit kernels require multiples of 16
        inputs = config.audio_channels * self.kernel
        self.proj = linear.replicated(inputs, config.dim, safe_quant_config(quant), f"{prefix}.proj")
        self.gated = GatedConv(config.dim, config.gated_conv_dim, self.kernel, quant, f"{prefix}.gated")

    def forward(self, latents_BAC: Tensor) -> Tensor:
        """Return ``[B, A, D]``."""
        return self.gated(F.silu(self.proj(unfold1d(latents_BAC, self.kernel))))


class Head(nn.Module):
    """Projection of tokens to latent values, modulated by the timestep's embedding."""

    def __init__(self, config: FusionConfig, output: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim), requires_grad=False)
        self.proj = linear.replicated(config.dim, output, quant, f"{prefix}.proj")

    def forward(self, x_BSD: Tensor, time_GBD: Tensor, timestep_segments: fused_ops.Segments) -> Tensor:
        """Return ``[B, S, output]``."""
        shift, scale = (self.modulation + time_GBD.unsqueeze(-2)).unbind(2)
        return self.proj(fused_ops.norm(x_BSD, fused_ops.ScaleShift(1 + scale, shift), timestep_segments, self.eps))


class ModalityAdapter(nn.Module):
    """Modules of one stream outside the blocks."""

    def __init__(
        self,
        config: FusionConfig,
        patch_embedding: nn.Module,
        output: int,
        quant: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        dim = config.dim
        precise = safe_quant_config(quant)  # not quantized: modulation scales all activations
        self.patch_embedding = patch_embedding
        self.text_embedding = TextEmbedding(config.text_dim, dim, config.text_len, quant, f"{prefix}.text_embedding")
        self.time_embedding = TimeEmbedding(config.freq_dim, dim, precise, f"{prefix}.time_embedding")
        self.time_projection = TimeProjection(dim, precise, f"{prefix}.time_projection")
        self.head = Head(config, output, precise, f"{prefix}.head")

    def embed_text(self, text: TextContext) -> None:
        """Embed a text, or the parts of a batch, unless they are cached.

        Raises:
            InputError: the text has more tokens than the model supports.
        """
        for part in text.parts:
            self.embed_text(part)
        if text.embedded is not None or text.parts:
            return
        length, limit = text.raw.shape[1], self.text_embedding.length
        if length > limit:
            raise InputError(f"the text has {length} tokens; at most {limit} are supported", code="text_length")
        text.embedded = self.text_embedding(text.raw)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], config: FusionConfig) -> Tensor:
    """Return video latents ``[B, C, F, H, W]``; channels vary fastest within a token."""
    parts = tokens.unflatten(1, grid).unflatten(-1, (*config.patch_size, config.video_channels))
    return parts.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)
