"""The fusion transformer of DreamID-Omni and Ovi: a video and an audio stream that read each other in every block.

Shape suffixes: B batch, C channels, F H W latent frames, rows, columns, V video tokens, A audio tokens, S either,
T text tokens, D width, G distinct timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from cache_dit import ForwardPattern
from torch import Tensor, nn
from vllm_omni.diffusion.cache.cachedit import CacheDiTAdapterConfig
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none

from port_kit.errors import InputError
from port_kit.models.wan_fusion.attention import CrossAttention, Positions, SelfAttention, Stream
from port_kit.models.wan_fusion.config import FusionConfig
from port_kit.models.wan_fusion.fused import Affine, add, add_norms, norm
from port_kit.models.wan_fusion.lanes import Lanes
from port_kit.models.wan_fusion.layers import FeedForward
from port_kit.models.wan_fusion.rope import RopeTables
from port_kit.models.wan_fusion.stems import AudioConvs, Stem, Text, VideoPatches, unpatchify
from port_kit.parallel.hsdp import blocks_without_memory
from port_kit.parallel.sequence import Boundary, boundary_plan, local_split, pad_tokens, padded_length

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


@dataclass(frozen=True)
class Conditions:
    """What one stream's half of a block needs besides tokens.

    Attributes:
        time: modulation vectors of the distinct timesteps, ``[G, B, 6, D]``.
        runs: how many of this rank's tokens, in order, have each timestep.
        positions: of this rank's tokens.
        text: embedded text.
    """

    time: Tensor
    runs: tuple[int, ...]
    positions: Positions
    text: Text


class Modulation(NamedTuple):
    """How a sub-layer's input is scaled and shifted after its norm, and its output weighed; one row a timestep."""

    affine: Affine
    gate: Tensor


class StreamBlock(nn.Module):
    """One stream's half of a fusion block."""

    def __init__(self, config: FusionConfig, stream: Stream, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim), requires_grad=False)
        self.self_attn = SelfAttention(config, stream, quant, f"{prefix}.self_attn")
        self.cross_attn = CrossAttention(config, stream, quant, f"{prefix}.cross_attn")
        self.ffn = FeedForward(config.dim, config.ffn_dim, quant, f"{prefix}.ffn")

    def modulations(self, conditions: Conditions) -> tuple[Modulation, Modulation]:
        """Return the modulation of self-attention and of the feed-forward."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + conditions.time).unbind(2)
        return Modulation(Affine(1 + scale1, shift1), gate1), Modulation(Affine(1 + scale2, shift2), gate2)

    def text_keys_values(self, text: Text, layer: int) -> tuple[Tensor, Tensor]:
        """Return this layer's keys and values of the text, computed at the first call with this text or its part."""
        if text.parts:
            keys, values = zip(*(self.text_keys_values(part, layer) for part in text.parts), strict=True)
            return torch.cat(keys), torch.cat(values)
        if layer not in text.keys_values:
            text.keys_values[layer] = self.cross_attn.project_text(text.embedded)
        return text.keys_values[layer]


class Attended(NamedTuple):
    """A stream after its self-attention.

    Attributes:
        tokens: residual state ``[B, S, D]``.
        query: its norm for the stream's own cross-attention.
        keys: its norm for the other stream's.
    """

    tokens: Tensor
    query: Tensor
    keys: Tensor


class FusionBlock(nn.Module):
    """Layer ``index`` of both streams. Each reads the other as it is after self-attention, before anything else."""

    def __init__(self, config: FusionConfig, index: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.index = index
        self.is_last = index == config.num_layers - 1
        engine = get_current_diffusion_config_or_none()
        self.lanes = Lanes(two=not (engine and engine.parallel_config.use_hsdp))
        self.eps = config.eps
        self.video = StreamBlock(config, "video", quant, f"{prefix}.video")
        self.audio = StreamBlock(config, "audio", quant, f"{prefix}.audio")

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        video: Conditions,
        audio: Conditions,
        skip_block: int | None = None,
        unused: Stream | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the streams after this layer, video first.

        The argument names are those of Cache-DiT's two-stream pattern.

        Args:
            hidden_states: video tokens ``[B, V, D]``.
            encoder_hidden_states: audio tokens ``[B, A, D]``.
            video: conditions of the video stream.
            audio: conditions of the audio stream.
            skip_block: layer that returns its input.
            unused: stream that nobody reads after the last layer, which then leaves it where the other has read it.
        """
        if skip_block == self.index:
            return hidden_states, encoder_hidden_states
        v_attention, v_ffn = self.video.modulations(video)
        a_attention, a_ffn = self.audio.modulations(audio)
        unread = unused if self.is_last else None
        with self.lanes.beside(hidden_states):
            a = self._self_attend(self.audio, self.video, encoder_hidden_states, a_attention, audio)
        v = self._self_attend(self.video, self.audio, hidden_states, v_attention, video)
        self.lanes.join(hidden_states)
        with self.lanes.beside(hidden_states):
            a_out = a.tokens if unread == "audio" else self._fuse(self.audio, a, v.keys, a_ffn, audio, video)
        v_out = v.tokens if unread == "video" else self._fuse(self.video, v, a.keys, v_ffn, video, audio)
        self.lanes.join(hidden_states)
        return v_out, a_out

    def _self_attend(
        self, half: StreamBlock, other: StreamBlock, x: Tensor, modulation: Modulation, own: Conditions
    ) -> Attended:
        if not x.shape[1]:
            return Attended(x, x, x)
        y = half.self_attn(norm(x, modulation.affine, own.runs, self.eps), own.positions)
        readers = half.cross_attn.norm, other.cross_attn.pre_attn_norm_fusion
        affines = [Affine(reader.weight, reader.bias) for reader in readers]
        return Attended(*add_norms(x, y, modulation.gate, affines, own.runs, self.eps))

    def _fuse(
        self,
        half: StreamBlock,
        x: Attended,
        other_keys: Tensor,
        modulation: Modulation,
        own: Conditions,
        theirs: Conditions,
    ) -> Tensor:
        if not x.tokens.shape[1]:
            return x.tokens
        text = half.text_keys_values(own.text, self.index)
        y = half.cross_attn(x.query, text, own.positions, other_keys, theirs.positions)
        tokens, normed = add_norms(x.tokens, y, None, [modulation.affine], own.runs, self.eps)
        return add(tokens, half.ffn(normed), modulation.gate, own.runs)


class WanFusionTransformer(nn.Module):
    """Predicts the flow of a video and an audio latent together.

    Args:
        config: architecture.
        quant_config: quantization of the linears, None for none.
        prefix: path of this module in the pipeline, for quantization and diagnostics.
    """

    _layerwise_offload_blocks_attrs: ClassVar = ["blocks"]
    _hsdp_shard_conditions: ClassVar = [lambda _name, module: isinstance(module, FusionBlock)]
    _sp_plan: ClassVar = boundary_plan({"shard": (3, 3, 4, 4)}, {"gather": (3, 3)})
    _cache_dit_adapter_config: ClassVar = CacheDiTAdapterConfig(
        block_forward_patterns={"blocks": ForwardPattern.Pattern_0}, has_separate_cfg=True, check_forward_pattern=False
    )
    packed_modules_mapping: ClassVar = {
        "qkv": ["q", "k", "v"],
        "kv": ["k", "v"],
        "kv_fusion": ["k_fusion", "v_fusion"],
        "gate_up": ["w1", "w3"],
    }
    stacked_params_mapping: ClassVar = [
        (f".{packed}", f".{part}", part if packed == "qkv" else slot)
        for packed, parts in packed_modules_mapping.items()
        for slot, part in enumerate(parts)
    ]

    def __init__(
        self, config: FusionConfig, *, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        path = f"{prefix}." if prefix else ""
        self.config = config
        self.rope = RopeTables(config.rope, config.head_dim)
        patches = VideoPatches(config, quant_config, f"{path}video.patch_embedding")
        convs = AudioConvs(config, quant_config, f"{path}audio.patch_embedding")
        self.video = Stem(config, patches, config.patch_dim, quant_config, f"{path}video")
        self.audio = Stem(config, convs, config.audio_channels, quant_config, f"{path}audio")
        with blocks_without_memory():
            self.blocks = nn.ModuleList(
                FusionBlock(config, i, quant_config, f"{path}blocks.{i}") for i in range(config.num_layers)
            )
        self.shard, self.gather = Boundary(), Boundary()

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        timestep: Tensor,
        video_text: Tensor | Text,
        audio_text: Tensor | Text,
        *,
        video_reference_frames: int = 0,
        audio_reference_lengths: tuple[int, ...] = (),
        first_frame_clean: bool = False,
        skip_block: int | None = None,
        unused: Stream | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict both flows. A stream of no frames or no tokens is left out, and the other runs alone.

        Args:
            video: latents ``[B, C, F, H, W]``; references are the last frames.
            audio: latents ``[B, A, C]``; references are the last tokens.
            timestep: ``[B]`` or 0-dim, in 0..1000; the same for both streams and for references.
            video_text: states ``[B, T, text_dim]`` for the video, unpadded, or a :class:`Text` kept over the steps.
            audio_text: the same for the audio.
            video_reference_frames: how many of the last frames are references.
            audio_reference_lengths: tokens of each audio reference.
            first_frame_clean: the first frame is given, not noise: its tokens have timestep 0.
            skip_block: layer to leave out (skip-layer guidance).
            unused: stream whose flow is not needed; it is returned as zeros, and what only it needs is left out.

        Returns:
            The flows, shaped as ``video`` and ``audio``, references included.

        Raises:
            InputError: latents that do not divide into patches, references or texts that are too long.
        """
        grid = self.video.patch_embedding.grid(video)
        frame = grid[1] * grid[2]
        v_runs = (frame, grid[0] * frame - frame) if first_frame_clean and grid[0] else (grid[0] * frame,)
        if skip_block is not None and not 0 <= skip_block < self.config.num_layers:
            raise InputError(f"block {skip_block} is to be skipped of {self.config.num_layers}", code="block_index")

        v, v_length, v_rope = self._tokens(
            self.video, video, self.rope.video(grid, video_reference_frames, video.device)
        )
        a, a_length, a_rope = self._tokens(
            self.audio, audio, self.rope.audio(audio.shape[1], audio_reference_lengths, audio.device)
        )
        v, a, v_rope, a_rope = self.shard(v, a, v_rope, a_rope)
        v_time, v_conditions = self._conditions(self.video, timestep, v, v_runs, v_length, v_rope, video_text)
        a_time, a_conditions = self._conditions(self.audio, timestep, a, (a_length,), a_length, a_rope, audio_text)
        for block in self.blocks:
            v, a = block(v, a, v_conditions, a_conditions, skip_block=skip_block, unused=unused)
        v = self._flow(self.video, v, v_time, v_conditions, is_used=unused != "video")
        a = self._flow(self.audio, a, a_time, a_conditions, is_used=unused != "audio")
        v, a = self.gather(v, a)
        v_flow = unpatchify(v[:, :v_length], grid, self.config) if unused != "video" else torch.zeros_like(video)
        return v_flow, a[:, :a_length] if unused != "audio" else torch.zeros_like(audio)

    def _flow(self, stem: Stem, tokens: Tensor, time: Tensor, conditions: Conditions, *, is_used: bool) -> Tensor:
        """Return this rank's part of a flow, in tokens; of a stream that is not used, no tokens."""
        if not is_used:
            return tokens[:, :0]
        return stem.head(tokens, time, conditions.runs)

    def _tokens(self, stem: Stem, latents: Tensor, rope: Tensor) -> tuple[Tensor, int, Tensor]:
        """Return a stream's tokens, their number, and their rope table; both tensors ready to be sharded."""
        tokens = stem.patch_embedding(latents)
        return pad_tokens(tokens), tokens.shape[1], pad_tokens(rope)

    def _conditions(
        self,
        stem: Stem,
        timestep: Tensor,
        tokens: Tensor,
        runs: tuple[int, ...],
        length: int,
        rope: Tensor,
        text: Tensor | Text,
    ) -> tuple[Tensor, Conditions]:
        """Return the time embedding ``[G, B, D]`` and the conditions of a stream whose ``tokens`` are sharded."""
        text = text if isinstance(text, Text) else Text(text)
        stem.embed_text(text)
        times = torch.stack((torch.zeros_like(timestep), timestep)[-len(runs) :])
        time = stem.time_embedding(times.view(len(runs), -1), tokens.dtype)
        positions = Positions(rope, padded_length(length))
        return time, Conditions(stem.time_projection(time), local_split(runs, tokens.shape[1]), positions, text)


def build_transformer(config: Mapping[str, Any]) -> WanFusionTransformer:
    """Build the transformer of a ``transformer/config.json`` on the current default device and dtype.

    Inside an engine it is quantized as the engine's configuration says.
    """
    engine = get_current_diffusion_config_or_none()
    quant = engine.quantization_config if engine is not None else None
    return WanFusionTransformer(FusionConfig.from_dict(config), quant_config=quant, prefix="transformer")
