"""Blocks: of one stream alone, and of two streams with cross-attention between them.

Shape suffixes: B batch, S tokens of a stream, V video tokens, A audio tokens, D width of a stream or of the
video, E width of the audio, G distinct timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none

from port_kit.models.wan.transformer import fused_ops
from port_kit.models.wan.transformer.attention import (
    CrossAttention,
    FusionAttention,
    Reader,
    SelfAttention,
    TextAttention,
)
from port_kit.models.wan.transformer.config import FusionConfig, Stream, TowerConfig
from port_kit.models.wan.transformer.fused_ops import PartialSums, Residual, ScaleShift
from port_kit.models.wan.transformer.layers import FeedForward
from port_kit.models.wan.transformer.modality_io import StreamConditioning, TextContext
from port_kit.models.wan.transformer.side_stream import SideStream
from port_kit.parallel.cfg_batching import weights_are_streamed
from port_kit.parallel.fp8_rows import Rows

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


class BlockInputs(NamedTuple):
    """Arguments of :meth:`FusionBlock.forward` for one branch."""

    hidden_states: Tensor
    encoder_hidden_states: Tensor
    video: StreamConditioning
    audio: StreamConditioning
    skip_layers: tuple[int, ...]
    unused: Stream | None


class Modulation(NamedTuple):
    """Scale and shift of a sub-layer's normalized input, and the gate of its output; one row per timestep."""

    scale_shift: ScaleShift
    gate: Tensor


class StreamBlock(nn.Module):
    """Layer ``index`` of one stream, around its cross-attention."""

    def __init__(
        self, config: TowerConfig, cross_attn: CrossAttention, index: int, quant: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.index = index
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim), requires_grad=False)
        self.self_attn = SelfAttention(config, quant, f"{prefix}.self_attn")
        self.cross_attn = cross_attn
        self.ffn = FeedForward(config.dim, config.ffn_dim, quant, f"{prefix}.ffn")

    def modulations(self, conditioning: StreamConditioning) -> tuple[Modulation, Modulation]:
        """Return the modulation of self-attention and of the feed-forward."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + conditioning.modulation).unbind(2)
        return Modulation(ScaleShift(1 + scale1, shift1), gate1), Modulation(ScaleShift(1 + scale2, shift2), gate2)

    def text_keys_values(self, text: TextContext) -> tuple[Tensor, Tensor]:
        """Return this layer's keys and values of the text; each text, or part of a batch, is projected once."""
        if text.parts:
            keys, values = zip(*(self.text_keys_values(part) for part in text.parts), strict=True)
            return torch.cat(keys), torch.cat(values)
        if self.index not in text.keys_values:
            text.keys_values[self.index] = self.cross_attn.project_text(text.embedded)
        return text.keys_values[self.index]

    def self_attend(
        self, x: Tensor, modulation: Modulation, conditioning: StreamConditioning, readers: Sequence[Reader]
    ) -> tuple[Any, ...]:
        """Return the tokens ``[B, S, D]`` after self-attention, then their norm for each reader."""
        segments = conditioning.timestep_segments
        normed = fused_ops.norm(x, modulation.scale_shift, segments, self.eps, self.self_attn.qkv)
        residual = Residual(self.self_attn(normed, conditioning.rotary), modulation.gate)
        scale_shifts = [ScaleShift(reader.norm.weight, reader.norm.bias) for reader in readers]
        linears = [reader.linear for reader in readers]
        return fused_ops.add_norms(x, residual, scale_shifts, segments, self.eps, linears)

    def feed_forward(
        self, x: Tensor, attended: PartialSums, modulation: Modulation, conditioning: StreamConditioning
    ) -> Tensor:
        """Add the result of cross-attention to the tokens, then that of the feed-forward."""
        segments = conditioning.timestep_segments
        residual, readers = Residual(attended, None), [self.ffn.up]
        tokens, normed = fused_ops.add_norms(x, residual, [modulation.scale_shift], segments, self.eps, readers)
        return fused_ops.add(tokens, Residual(self.ffn(normed), modulation.gate), segments)


class TowerBlock(StreamBlock):
    """Layer ``index`` of a tower that reads no other stream inside its blocks."""

    def __init__(self, config: TowerConfig, index: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__(config, TextAttention(config, quant, f"{prefix}.cross_attn"), index, quant, prefix)

    def forward(self, hidden_states: Tensor, conditioning: StreamConditioning) -> Tensor:
        """Return the tokens ``[B, S, D]`` after this layer."""
        attention, ffn = self.modulations(conditioning)
        x, query = self.self_attend(hidden_states, attention, conditioning, [self.cross_attn.query_reader])
        attended = self.cross_attn(query, self.text_keys_values(conditioning.text))
        return self.feed_forward(x, attended, ffn, conditioning)


class AttnState(NamedTuple):
    """State of a stream after its self-attention.

    Attributes:
        tokens: residual stream ``[B, S, D]``.
        query: norm of the tokens for the stream's own cross-attention.
        keys: norm of the tokens for the other stream's cross-attention.
    """

    tokens: Tensor
    query: Rows
    keys: Rows


class FusionBlock(nn.Module):
    """Layer ``index`` of both streams. Cross-attention reads the other stream's state after its self-attention."""

    def __init__(self, config: FusionConfig, index: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.index = index
        self.is_last = index == config.num_layers - 1
        engine = get_current_diffusion_config_or_none()
        self.side_stream = SideStream(enabled=not weights_are_streamed(engine))
        video, audio = config.video, config.audio
        v_cross = FusionAttention(video, audio, quant, f"{prefix}.video.cross_attn")
        a_cross = FusionAttention(audio, video, quant, f"{prefix}.audio.cross_attn")
        self.video = StreamBlock(video, v_cross, index, quant, f"{prefix}.video")
        self.audio = StreamBlock(audio, a_cross, index, quant, f"{prefix}.audio")

    def project_texts(self, inputs: BlockInputs) -> None:
        """Compute the keys and values of a branch's texts, unless they are cached."""
        for half, conditioning in ((self.audio, inputs.audio), (self.video, inputs.video)):
            for text in conditioning.text.parts or (conditioning.text,):
                half.text_keys_values(text)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        video: StreamConditioning,
        audio: StreamConditioning,
        skip_layers: tuple[int, ...] = (),
        unused: Stream | None = None,
        extra_branches: Sequence[BlockInputs] = (),
    ) -> tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]]:
        """Return the streams after this layer, video first.

        The argument names are those of Cache-DiT's two-stream pattern.

        Args:
            hidden_states: video tokens ``[B, V, D]``.
            encoder_hidden_states: audio tokens ``[B, A, E]``.
            video: conditioning of the video stream.
            audio: conditioning of the audio stream.
            skip_layers: layers that return their input.
            unused: stream whose output is not needed; the last layer skips its cross-attention and feed-forward.
            extra_branches: inputs of further branches; if there are any, a list with all branches is returned.
        """
        own = self._run_branch(BlockInputs(hidden_states, encoder_hidden_states, video, audio, skip_layers, unused))
        return [own, *map(self._run_branch, extra_branches)] if extra_branches else own

    def _run_branch(self, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        video_tokens, audio_tokens, video, audio, skip_layers, unused = inputs
        if self.index in skip_layers:
            return video_tokens, audio_tokens
        v_attention, v_ffn = self.video.modulations(video)
        a_attention, a_ffn = self.audio.modulations(audio)
        skipped = unused if self.is_last else None
        with self.side_stream.fork(video_tokens):
            a = self._self_attend(self.audio, self.video, audio_tokens, a_attention, audio)
        v = self._self_attend(self.video, self.audio, video_tokens, v_attention, video)
        self.side_stream.join(video_tokens)
        with self.side_stream.fork(video_tokens):
            a_out = a.tokens if skipped == "audio" else self._fuse(self.audio, a, v.keys, a_ffn, audio, video)
        v_out = v.tokens if skipped == "video" else self._fuse(self.video, v, a.keys, v_ffn, video, audio)
        self.side_stream.join(video_tokens)
        return v_out, a_out

    def _self_attend(
        self, half: StreamBlock, other: StreamBlock, x: Tensor, modulation: Modulation, own: StreamConditioning
    ) -> AttnState:
        if not x.shape[1]:
            return AttnState(x, x, x)
        readers = half.cross_attn.query_reader, other.cross_attn.key_reader
        return AttnState(*half.self_attend(x, modulation, own, readers))

    def _fuse(
        self,
        half: StreamBlock,
        x: AttnState,
        other_keys: Rows,
        modulation: Modulation,
        own: StreamConditioning,
        theirs: StreamConditioning,
    ) -> Tensor:
        if not x.tokens.shape[1]:
            return x.tokens
        text = half.text_keys_values(own.text)
        attended = half.cross_attn(x.query, text, own.rotary, other_keys, theirs.rotary)
        return half.feed_forward(x.tokens, attended, modulation, own)
