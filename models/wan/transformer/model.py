"""The fusion transformer of DreamID-Omni and Ovi: a video and an audio stream with cross-attention in every block.

Shape suffixes: B batch, C channels, F H W latent frames, rows, columns, V video tokens, A audio tokens, S either,
T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from cache_dit import ForwardPattern
from torch import Tensor, nn
from vllm.model_executor.models.utils import maybe_prefix
from vllm_omni.diffusion.cache.cachedit import CacheDiTAdapterConfig
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none

from port_kit.errors import InputError
from port_kit.models.wan.transformer.block import BlockInputs, FusionBlock
from port_kit.models.wan.transformer.block_graphs import BlockGraphs
from port_kit.models.wan.transformer.config import FusionConfig, Stream
from port_kit.models.wan.transformer.modality_io import ModalityAdapter, StreamConditioning, TextContext
from port_kit.models.wan.transformer.tower import WanTower, stacked_parameters
from port_kit.parallel.cancellation import check_cancellation_between_blocks
from port_kit.parallel.cfg_batching import weights_are_streamed
from port_kit.parallel.comm.stream_interleave import InterleavedStreams
from port_kit.parallel.hsdp import meta_blocks
from port_kit.parallel.layers import engine_quantization
from port_kit.parallel.sequence import make_sp_plan

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
    skip_layers: tuple[int, ...] = ()
    unused: Stream | None = None


@dataclass(frozen=True)
class ForwardContext:
    """State of a branch from its embedding to the output heads, without its tokens.

    Attributes:
        inputs: arguments of the branch.
        conditioning: of the video and of the audio.
    """

    inputs: BranchInputs
    conditioning: tuple[StreamConditioning, StreamConditioning]

    def block_inputs(self, tokens: Pair) -> BlockInputs:
        """Return the arguments of a block."""
        return BlockInputs(*tokens, *self.conditioning, self.inputs.skip_layers, self.inputs.unused)


class WanFusionTransformer(nn.Module):
    """Transformer that predicts the flows of a video and an audio latent together.

    Args:
        config: architecture.
        quant_config: quantization of the linears; None for none.
        prefix: path of this module in the pipeline, for quantization and diagnostics.
    """

    #: Part of vLLM-Omni's protocol ``SupportsSkipLayerGuidance``, with :meth:`validate_skip_layers`.
    supports_skip_layer_guidance: ClassVar[bool] = True
    _layerwise_offload_blocks_attrs: ClassVar = ["blocks"]
    _hsdp_shard_conditions: ClassVar = [lambda _name, module: isinstance(module, FusionBlock)]
    _sp_plan: ClassVar = make_sp_plan(
        {f"{stream}.shard": (3, 4) for stream in ("video", "audio")},
        {f"{stream}.gather": (3,) for stream in ("video", "audio")},
    )
    _cache_dit_adapter_config: ClassVar = CacheDiTAdapterConfig(
        block_forward_patterns={"blocks": ForwardPattern.Pattern_0}, has_separate_cfg=True, check_forward_pattern=False
    )
    packed_modules_mapping: ClassVar = {**WanTower.packed_modules_mapping, "kv_fusion": ["k_fusion", "v_fusion"]}
    stacked_params_mapping: ClassVar = stacked_parameters(packed_modules_mapping)

    def __init__(
        self, config: FusionConfig, *, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.config = config
        self.engine = get_current_diffusion_config_or_none()
        self.video = ModalityAdapter(config.video, quant_config, maybe_prefix(prefix, "video"))
        self.audio = ModalityAdapter(config.audio, quant_config, maybe_prefix(prefix, "audio"))
        self.graphs: BlockGraphs | None = None
        with meta_blocks():
            self.blocks = nn.ModuleList(
                FusionBlock(config, i, quant_config, maybe_prefix(prefix, f"blocks.{i}"))
                for i in range(config.num_layers)
            )

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
        skip_layers: tuple[int, ...] = (),
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
            skip_layers: layers to omit (skip-layer guidance).
            unused: stream whose flow is not needed; zeros are returned for it, and the last layer does not compute it.
            extra_branches: arguments of further branches, which run through each block before the next block runs.

        Returns:
            The flows, shaped as ``video`` and ``audio``, references included. With ``extra_branches``, a list with
            the flows of all branches.

        Raises:
            InputError: the latents do not divide into patches, references or texts are too long, or a layer to omit
                does not exist.
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
            skip_layers=skip_layers,
            unused=unused,
        )
        prepared = [self._prepare(inputs) for inputs in (own, *(BranchInputs(**extra) for extra in extra_branches))]
        states, contexts = [tokens for tokens, _ in prepared], [context for _, context in prepared]
        del prepared  # it would keep each branch's first tokens alive while blocks run
        if extra_branches and weights_are_streamed(self.engine):
            for index, block in enumerate(self.blocks):
                self._check_cancellation(index)
                first, *rest = (context.block_inputs(tokens) for context, tokens in zip(contexts, states, strict=True))
                states = block(*first, extra_branches=rest)
        elif self.graphs is not None and self.graphs.is_usable():
            self._check_cancellation(0)
            self.graphs.run(states, contexts, self._run_interleaved)
        else:
            self._run_interleaved(states, contexts, check=self._check_cancellation)
        flows = [self._compute_flows(tokens, context) for tokens, context in zip(states, contexts, strict=True)]
        return flows if extra_branches else flows[0]

    def use_cuda_graphs(self, device: torch.device) -> None:
        """From now on, capture all blocks as CUDA graphs and replay them."""
        self.graphs = BlockGraphs(self.blocks, device)

    def validate_skip_layers(self, skip_layers: tuple[int, ...]) -> None:
        """Raise InputError if this transformer has no layer of an index; part of vLLM-Omni's protocol."""
        if wrong := [layer for layer in skip_layers if not 0 <= layer < self.config.num_layers]:
            raise InputError(
                f"skip_layers has {wrong[0]}; layers are 0 to {self.config.num_layers - 1}", code="block_index"
            )

    def _check_cancellation(self, block: int) -> None:
        check_cancellation_between_blocks(block, len(self.blocks), self.engine)

    def _run_interleaved(
        self, states: list[Pair], contexts: Sequence[ForwardContext], check: Callable[[int], None] | None = None
    ) -> None:
        """Run the branches through all blocks, one call per branch and block; replace their tokens in ``states``.

        ``check`` is called before each block. With CUDA graphs it is None: ranks could not vote if one of them replayed
        a graph and another one ran without.
        """
        if len(contexts) > 1:  # texts that branches share are projected before the streams fork
            for block in self.blocks:
                for context, tokens in zip(contexts, states, strict=True):
                    block.project_texts(context.block_inputs(tokens))
        streams = InterleavedStreams(states[0][0].device, branches=len(contexts))
        for number, block in enumerate(self.blocks):
            if check is not None:
                check(number)
            for index, context in enumerate(contexts):
                with streams.stream(index):
                    options = {"skip_layers": context.inputs.skip_layers, "unused": context.inputs.unused}
                    states[index] = block(*states[index], *context.conditioning, **options)
        streams.join()

    def _prepare(self, inputs: BranchInputs) -> tuple[Pair, ForwardContext]:
        """Embed the inputs of a branch; return the tokens of both streams and the context of the branch."""
        video, audio = inputs.video, inputs.audio
        self.validate_skip_layers(inputs.skip_layers)
        grid = self.video.patch_embedding.grid(video)
        v, v_conditioning = self.video.embed(
            video,
            self.video.rope.video(grid, inputs.video_reference_frames, video.device),
            inputs.timestep,
            inputs.video_text,
            first_frame_clean=inputs.first_frame_clean,
        )
        a, a_conditioning = self.audio.embed(
            audio,
            self.audio.rope.audio(audio.shape[1], inputs.audio_reference_lengths, audio.device),
            inputs.timestep,
            inputs.audio_text,
        )
        return (v, a), ForwardContext(inputs, (v_conditioning, a_conditioning))

    def _compute_flows(self, tokens: Pair, context: ForwardContext) -> Pair:
        """Return the flows for the tokens of the last block."""
        inputs, (v_conditioning, a_conditioning) = context.inputs, context.conditioning
        return (
            self._flow("video", tokens[0], v_conditioning, inputs.unused, inputs.video),
            self._flow("audio", tokens[1], a_conditioning, inputs.unused, inputs.audio),
        )

    def _flow(
        self, stream: Stream, tokens: Tensor, conditioning: StreamConditioning, unused: Stream | None, latents: Tensor
    ) -> Tensor:
        """Return the flow of a stream; zeros if it is unused."""
        adapter: ModalityAdapter = getattr(self, stream)
        if stream != unused:
            return adapter.predict(tokens, conditioning)
        adapter.gather(tokens[:, :0])  # vLLM-Omni counts the boundaries that are open
        return torch.zeros_like(latents)


def build_transformer(config: Mapping[str, Any]) -> WanFusionTransformer:
    """Build the transformer of a ``transformer/config.json`` on the current default device and dtype.

    Inside an engine, the engine's configuration selects the quantization.
    """
    dims = FusionConfig.from_dict(config)
    return WanFusionTransformer(dims, quant_config=engine_quantization(), prefix="transformer")
