"""The fusion transformer of DreamID-Omni and Ovi: a video and an audio stream with cross-attention in every block.

Shape suffixes: B batch, C channels, F H W latent frames, rows, columns, V video tokens, A audio tokens, S either,
T text tokens, D width, G distinct timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from cache_dit import ForwardPattern
from torch import Tensor, nn
from vllm_omni.diffusion.cache.cachedit import CacheDiTAdapterConfig
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none

from port_kit.errors import InputError
from port_kit.models.wan.transformer.attention import RotaryContext, Stream
from port_kit.models.wan.transformer.block import BlockInputs, FusionBlock, StreamConditioning
from port_kit.models.wan.transformer.config import FusionConfig
from port_kit.models.wan.transformer.fused_ops import Segments
from port_kit.models.wan.transformer.modality_io import (
    AudioPatchEmbed,
    ModalityAdapter,
    TextContext,
    VideoPatchEmbed,
    unpatchify,
)
from port_kit.models.wan.transformer.rope import RopeTables
from port_kit.parallel.cfg_batching import weights_are_streamed
from port_kit.parallel.comm.stream_interleave import InterleavedStreams
from port_kit.parallel.hsdp import meta_blocks
from port_kit.parallel.sequence import SPBoundary, local_segment_lengths, make_sp_plan, pad_tokens, padded_length

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

#: A tensor of the video stream and one of the audio stream.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BranchInputs:
    """Arguments of :meth:`WanFusionTransformer.forward` for one branch."""

    video: Tensor
    audio: Tensor
    timestep: Tensor
    video_text: Tensor | TextContext
    audio_text: Tensor | TextContext
    video_reference_frames: int = 0
    audio_reference_lengths: tuple[int, ...] = ()
    first_frame_clean: bool = False
    skip_block: int | None = None
    unused: Stream | None = None


@dataclass(frozen=True)
class ForwardContext:
    """State of a branch from its embedding to the output heads, without its tokens.

    Attributes:
        inputs: arguments of the branch.
        conditioning: of the video and of the audio.
        grid: numbers of video tokens (frames, rows, columns).
        lengths: numbers of video and audio tokens of all ranks, without padding.
        times: time embeddings ``[G, B, D]`` of video and audio.
    """

    inputs: BranchInputs
    conditioning: tuple[StreamConditioning, StreamConditioning]
    grid: tuple[int, int, int]
    lengths: tuple[int, int]
    times: Pair

    def block_inputs(self, tokens: Pair) -> BlockInputs:
        """Return the arguments of a block."""
        return BlockInputs(*tokens, *self.conditioning, self.inputs.skip_block, self.inputs.unused)


class WanFusionTransformer(nn.Module):
    """Transformer that predicts the flows of a video and an audio latent together.

    Args:
        config: architecture.
        quant_config: quantization of the linears; None for none.
        prefix: path of this module in the pipeline, for quantization and diagnostics.
    """

    _layerwise_offload_blocks_attrs: ClassVar = ["blocks"]
    _hsdp_shard_conditions: ClassVar = [lambda _name, module: isinstance(module, FusionBlock)]
    _sp_plan: ClassVar = make_sp_plan({"shard": (3, 3, 4, 4)}, {"gather": (3, 3)})
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
        (f".{packed}", f".{part}", part if packed == "qkv" else index)
        for packed, parts in packed_modules_mapping.items()
        for index, part in enumerate(parts)
    ]

    def __init__(
        self, config: FusionConfig, *, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        path = f"{prefix}." if prefix else ""
        self.config = config
        self.engine = get_current_diffusion_config_or_none()
        self.rope = RopeTables(config.rope, config.head_dim)
        patches = VideoPatchEmbed(config, quant_config, f"{path}video.patch_embedding")
        convs = AudioPatchEmbed(config, quant_config, f"{path}audio.patch_embedding")
        self.video = ModalityAdapter(config, patches, config.patch_dim, quant_config, f"{path}video")
        self.audio = ModalityAdapter(config, convs, config.audio_channels, quant_config, f"{path}audio")
        with meta_blocks():
            self.blocks = nn.ModuleList(
                FusionBlock(config, i, quant_config, f"{path}blocks.{i}") for i in range(config.num_layers)
            )
        self.shard, self.gather = SPBoundary(), SPBoundary()

    def forward(
        self,
        video: Tensor,
        audio: Tensor,
        timestep: Tensor,
        video_text: Tensor | TextContext,
        audio_text: Tensor | TextContext,
        *,
        video_reference_frames: int = 0,
        audio_reference_lengths: tuple[int, ...] = (),
        first_frame_clean: bool = False,
        skip_block: int | None = None,
        unused: Stream | None = None,
        extra_branches: Sequence[Mapping[str, Any]] = (),
    ) -> Pair | list[Pair]:
        """Predict both flows. A stream without frames or tokens is omitted.

        Args:
            video: latents ``[B, C, F, H, W]``; references are the last frames.
            audio: latents ``[B, A, C]``; references are the last tokens.
            timestep: ``[B]`` or 0-dim, in 0..1000; the same for both streams and for references.
            video_text: states ``[B, T, text_dim]`` for the video, unpadded, or a :class:`TextContext` that caches
                their projections over the steps.
            audio_text: the same for the audio.
            video_reference_frames: number of frames at the end that are references.
            audio_reference_lengths: number of tokens of each audio reference.
            first_frame_clean: the first frame is conditioning without noise: its tokens have timestep 0.
            skip_block: layer to omit (skip-layer guidance).
            unused: stream whose flow is not needed; zeros are returned for it, and the last layer does not compute it.
            extra_branches: arguments of further branches, which run through each block before the next block runs.

        Returns:
            The flows, shaped as ``video`` and ``audio``, references included. With ``extra_branches``, a list with
            the flows of all branches.

        Raises:
            InputError: the latents do not divide into patches, or references or texts are too long.
        """
        own = BranchInputs(
            video,
            audio,
            timestep,
            video_text,
            audio_text,
            video_reference_frames=video_reference_frames,
            audio_reference_lengths=audio_reference_lengths,
            first_frame_clean=first_frame_clean,
            skip_block=skip_block,
            unused=unused,
        )
        prepared = [self._prepare(inputs) for inputs in (own, *(BranchInputs(**extra) for extra in extra_branches))]
        states, contexts = [tokens for tokens, _ in prepared], [context for _, context in prepared]
        del prepared  # it would keep each branch's first tokens alive while blocks run
        if extra_branches and weights_are_streamed(self.engine):
            for block in self.blocks:
                first, *rest = (context.block_inputs(tokens) for context, tokens in zip(contexts, states, strict=True))
                states = block(*first, extra_branches=rest)
        else:
            self._run_interleaved(states, contexts)
        flows = [self._compute_flows(tokens, context) for tokens, context in zip(states, contexts, strict=True)]
        return flows if extra_branches else flows[0]

    def _run_interleaved(self, states: list[Pair], contexts: Sequence[ForwardContext]) -> None:
        """Run the branches through all blocks, one call per branch and block; replace their tokens in ``states``."""
        if len(contexts) > 1:  # texts that branches share are projected before the streams fork
            for block in self.blocks:
                for context, tokens in zip(contexts, states, strict=True):
                    block.project_texts(context.block_inputs(tokens))
        streams = InterleavedStreams(states[0][0].device, branches=len(contexts))
        for block in self.blocks:
            for index, context in enumerate(contexts):
                with streams.stream(index):
                    options = {"skip_block": context.inputs.skip_block, "unused": context.inputs.unused}
                    states[index] = block(*states[index], *context.conditioning, **options)
        streams.join()

    def _prepare(self, inputs: BranchInputs) -> tuple[Pair, ForwardContext]:
        """Embed the inputs of a branch; return the tokens of both streams and the context of the branch."""
        video, audio, skip_block = inputs.video, inputs.audio, inputs.skip_block
        grid = self.video.patch_embedding.grid(video)
        cells = grid[1] * grid[2]
        split = inputs.first_frame_clean and grid[0]
        v_segments = (cells, grid[0] * cells - cells) if split else (grid[0] * cells,)
        if skip_block is not None and not 0 <= skip_block < self.config.num_layers:
            raise InputError(
                f"skip_block is {skip_block}; it must be 0 to {self.config.num_layers - 1}", code="block_index"
            )
        v, v_length, v_rope = self._tokens(
            self.video, video, self.rope.video(grid, inputs.video_reference_frames, video.device)
        )
        a, a_length, a_rope = self._tokens(
            self.audio, audio, self.rope.audio(audio.shape[1], inputs.audio_reference_lengths, audio.device)
        )
        v, a, v_rope, a_rope = self.shard(v, a, v_rope, a_rope)
        v_time, v_conditioning = self._conditioning(
            self.video, inputs.timestep, v, v_segments, v_length, v_rope, inputs.video_text
        )
        a_time, a_conditioning = self._conditioning(
            self.audio, inputs.timestep, a, (a_length,), a_length, a_rope, inputs.audio_text
        )
        context = ForwardContext(inputs, (v_conditioning, a_conditioning), grid, (v_length, a_length), (v_time, a_time))
        return (v, a), context

    def _compute_flows(self, tokens: Pair, context: ForwardContext) -> Pair:
        """Return the flows for the tokens of the last block."""
        (v, a), unused = tokens, context.inputs.unused
        v = self._output_tokens(self.video, v, context.times[0], context.conditioning[0], is_used=unused != "video")
        a = self._output_tokens(self.audio, a, context.times[1], context.conditioning[1], is_used=unused != "audio")
        v, a = self.gather(v, a)
        v, a = v[:, : context.lengths[0]], a[:, : context.lengths[1]]
        if unused == "video":
            return torch.zeros_like(context.inputs.video), a
        flow = unpatchify(v, context.grid, self.config)
        return flow, torch.zeros_like(context.inputs.audio) if unused == "audio" else a

    def _output_tokens(
        self, adapter: ModalityAdapter, tokens: Tensor, time: Tensor, conditioning: StreamConditioning, *, is_used: bool
    ) -> Tensor:
        """Return this rank's part of a flow, in tokens; no tokens for an unused stream."""
        if not is_used:
            return tokens[:, :0]
        return adapter.head(tokens, time, conditioning.timestep_segments)

    def _tokens(self, adapter: ModalityAdapter, latents: Tensor, rope: Tensor) -> tuple[Tensor, int, Tensor]:
        """Return a stream's tokens, their number, and their rotary table; both tensors are padded for sharding."""
        tokens = adapter.patch_embedding(latents)
        return pad_tokens(tokens), tokens.shape[1], pad_tokens(rope)

    def _conditioning(
        self,
        adapter: ModalityAdapter,
        timestep: Tensor,
        tokens: Tensor,
        timestep_segments: Segments,
        length: int,
        rope: Tensor,
        text: Tensor | TextContext,
    ) -> tuple[Tensor, StreamConditioning]:
        """Return the time embedding ``[G, B, D]`` and the conditioning of a stream; ``tokens`` are this rank's."""
        text = text if isinstance(text, TextContext) else TextContext(text)
        adapter.embed_text(text)
        times = torch.stack((torch.zeros_like(timestep), timestep)[-len(timestep_segments) :])
        time = adapter.time_embedding(times.view(len(timestep_segments), -1), tokens.dtype)
        rotary = RotaryContext(rope, padded_length(length))
        return time, StreamConditioning(
            adapter.time_projection(time), local_segment_lengths(timestep_segments, tokens.shape[1]), rotary, text
        )


def build_transformer(config: Mapping[str, Any]) -> WanFusionTransformer:
    """Build the transformer of a ``transformer/config.json`` on the current default device and dtype.

    Inside an engine, the engine's configuration selects the quantization.
    """
    engine = get_current_diffusion_config_or_none()
    quant = engine.quantization_config if engine is not None else None
    return WanFusionTransformer(FusionConfig.from_dict(config), quant_config=quant, prefix="transformer")
