"""Input and output adapters of a stream: latents to tokens, timesteps and texts to conditioning, tokens to latents.

Shape suffixes: B batch, C channels, F H W latent frames, rows, columns, V video tokens, A audio tokens, S either,
T text tokens, D width, G distinct timesteps.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.models.utils import maybe_prefix
from vllm_omni.quantization.component_config import safe_quant_config

from port_kit.errors import InputError
from port_kit.models.wan.transformer import fused_ops
from port_kit.models.wan.transformer.attention import RotaryContext
from port_kit.models.wan.transformer.fused_ops import Segments
from port_kit.models.wan.transformer.layers import GatedConv, TextEmbedding, TimeEmbedding, TimeProjection, unfold1d
from port_kit.models.wan.transformer.rope import RopeTables
from port_kit.parallel import linear
from port_kit.parallel.sequence import SPBoundary, local_segment_lengths, pad_tokens, padded_length

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from port_kit.models.wan.transformer.config import TowerConfig


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


@dataclass(frozen=True)
class StreamConditioning:
    """Conditioning of one stream, shared by all blocks.

    Attributes:
        grid: numbers of tokens along each axis, of all ranks.
        time: embedding of the distinct timesteps, ``[G, B, D]``.
        modulation: modulation vectors of the distinct timesteps, ``[G, B, 6, D]``.
        timestep_segments: numbers of this rank's tokens per timestep, in order.
        rotary: positions of this rank's tokens.
        text: embedded text.
        bridge_rotary: positions of this rank's tokens for attention between towers, if modules between the blocks have
            positions of their own.
    """

    grid: tuple[int, ...]
    time: Tensor
    modulation: Tensor
    timestep_segments: Segments
    rotary: RotaryContext
    text: TextContext
    bridge_rotary: RotaryContext | None = None


class StreamBoundaries(NamedTuple):
    """Boundaries of a stream for sequence parallelism: one that shards its tokens, one that gathers its flow."""

    shard: SPBoundary
    gather: SPBoundary


class VideoPatchEmbed(nn.Module):
    """Embedding of video latents: one linear per patch."""

    def __init__(self, config: TowerConfig, quant: QuantizationConfig | None, prefix: str) -> None:
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

    def grid(self, latents_BCFHW: Tensor) -> tuple[int, ...]:
        """Return the token counts (frames, rows, columns).

        Raises:
            InputError: the latents do not divide into patches.
        """
        sizes = latents_BCFHW.shape[2:]
        if any(size % step for size, step in zip(sizes, self.patch, strict=True)):
            raise InputError(
                f"video latents of {tuple(sizes)} do not divide into patches of {self.patch}", code="latent_size"
            )
        return tuple(size // step for size, step in zip(sizes, self.patch, strict=True))

    def unpatchify(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Return latents ``[B, C, F, H, W]``; channels vary fastest within a token."""
        parts = tokens.unflatten(1, grid).unflatten(-1, (*self.patch, -1))
        return parts.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)


class AudioPatchEmbed(nn.Module):
    """Embedding of audio latents: a convolution and a gated convolution along time, or one linear."""

    def __init__(self, config: TowerConfig, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.kernel = config.conv_kernel or 1
        # the input of the model is not quantized: eight-bit kernels require multiples of 16, and 7 taps give 140
        self.proj = linear.replicated(
            config.patch_dim * self.kernel, config.dim, safe_quant_config(quant), f"{prefix}.proj"
        )
        self.gated: GatedConv | None = None
        if config.conv_kernel is not None:
            self.gated = GatedConv(config.dim, config.gated_conv_dim, self.kernel, quant, f"{prefix}.gated")

    def forward(self, latents_BAC: Tensor) -> Tensor:
        """Return ``[B, A, D]``."""
        tokens = self.proj(unfold1d(latents_BAC, self.kernel))
        return tokens if self.gated is None else self.gated(F.silu(tokens))

    def grid(self, latents_BAC: Tensor) -> tuple[int, ...]:
        """Return the number of tokens."""
        return (latents_BAC.shape[1],)

    def unpatchify(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Return latents ``[B, A, C]``, which are the tokens."""
        return tokens


class Head(nn.Module):
    """Projection of tokens to latent values, modulated by the timestep's embedding."""

    def __init__(self, config: TowerConfig, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim), requires_grad=False)
        self.proj = linear.replicated(config.dim, config.flow_dim, quant, f"{prefix}.proj")

    def forward(self, x_BSD: Tensor, time_GBD: Tensor, timestep_segments: Segments) -> Tensor:
        """Return the values of the flow, ``[B, S, flow_dim]``."""
        shift, scale = (self.modulation + time_GBD.unsqueeze(-2)).unbind(2)
        return self.proj(fused_ops.norm(x_BSD, fused_ops.ScaleShift(1 + scale, shift), timestep_segments, self.eps))


class ModalityAdapter(nn.Module):
    """Modules of one stream outside the blocks."""

    def __init__(self, config: TowerConfig, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        dim = config.dim
        precise = safe_quant_config(quant)  # not quantized: modulation scales all activations
        path = partial(maybe_prefix, prefix)
        self.rope = RopeTables(config.rope, config.head_dim)
        self.patch_embedding: VideoPatchEmbed | AudioPatchEmbed = (
            VideoPatchEmbed(config, quant, path("patch_embedding"))
            if config.modality == "video"
            else AudioPatchEmbed(config, quant, path("patch_embedding"))
        )
        self.text_embedding = TextEmbedding(config.text_dim, dim, config.text_len, quant, path("text_embedding"))
        self.time_embedding = TimeEmbedding(
            config.freq_dim, dim, precise, path("time_embedding"), precise=config.precise_time
        )
        self.time_projection = TimeProjection(dim, precise, path("time_projection"))
        self.head = Head(config, precise, path("head"))
        self.shard, self.gather = SPBoundary(), SPBoundary()

    @property
    def boundaries(self) -> StreamBoundaries:
        """Boundaries of this adapter, which a transformer refers to in its ``_sp_plan``."""
        return StreamBoundaries(self.shard, self.gather)

    def embed(
        self,
        latents: Tensor,
        rope: Tensor,
        timestep: Tensor,
        text: Tensor | TextContext,
        *,
        first_frame_clean: bool = False,
        bridge_rope: Tensor | None = None,
        boundaries: StreamBoundaries | None = None,
    ) -> tuple[Tensor, StreamConditioning]:
        """Return this rank's tokens ``[B, S, D]`` and the conditioning of the blocks.

        Args:
            latents: of a video ``[B, C, F, H, W]``, of audio ``[B, A, C]``.
            rope: table of all tokens (:attr:`rope`).
            timestep: ``[B]`` or 0-dim, in 0..1000.
            text: states ``[B, T, text_dim]``, unpadded, or a :class:`TextContext` that caches their projections.
            first_frame_clean: tokens of the first frame have timestep 0.
            bridge_rope: table of all tokens for attention between towers.
            boundaries: replace those of this adapter.

        Raises:
            InputError: the latents do not divide into patches, or the text is too long.
        """
        grid = self.patch_embedding.grid(latents)
        length = prod(grid)
        clean = length // grid[0] if first_frame_clean and grid[0] else 0
        segments = (clean, length - clean) if clean else (length,)
        tables = (rope,) if bridge_rope is None else (rope, bridge_rope)
        shard = (boundaries or self.boundaries).shard
        tokens, *tables = shard(*map(pad_tokens, (self.patch_embedding(latents), *tables)))
        rotaries = [RotaryContext(table, padded_length(length)) for table in tables]
        text = text if isinstance(text, TextContext) else TextContext(text)
        self.embed_text(text)
        times = torch.stack((torch.zeros_like(timestep), timestep)[-len(segments) :])
        time = self.time_embedding(times.view(len(segments), -1), tokens.dtype)
        return tokens, StreamConditioning(
            grid=grid,
            time=time.to(tokens.dtype),
            modulation=self.time_projection(time).to(tokens.dtype),
            timestep_segments=local_segment_lengths(segments, tokens.shape[1]),
            rotary=rotaries[0],
            text=text,
            bridge_rotary=None if bridge_rope is None else rotaries[1],
        )

    def predict(
        self, tokens: Tensor, conditioning: StreamConditioning, boundaries: StreamBoundaries | None = None
    ) -> Tensor:
        """Return the flow for this rank's tokens after the last block, of all ranks and shaped as the latents."""
        grid = conditioning.grid
        (flow,) = (boundaries or self.boundaries).gather(
            self.head(tokens, conditioning.time, conditioning.timestep_segments)
        )
        return self.patch_embedding.unpatchify(flow[:, : prod(grid)], grid)

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
