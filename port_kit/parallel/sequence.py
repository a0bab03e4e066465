"""Sequence parallelism for models with several token streams of any length.

vLLM-Omni shards tensors according to a transformer's ``_sp_plan``. This module solves three problems with it:

* A plan that matches no module only logs a warning, and the result is correct without any sharding. Put a
  :class:`SPBoundary` before the sharded region and another after it, and refer to both in :func:`make_sp_plan`.
  ``port-kit verify parallel`` proves that tokens were sharded.
* Lengths must be multiples of the number of ranks, but attention must ignore padding. Pad with :func:`pad_tokens`, pass
  the unpadded length to each attention, and slice after the gather. :class:`PaddedAttention` drops padded keys without
  a mask, under Ulysses, Ring, AllGather-KV and Ulysses x Ring.
* Attention over replicated keys (text) must not use sequence parallelism:
  ``PaddedAttention(..., skip_sequence_parallel=True)``.

A transformer with two streams::

    class MyTransformer(nn.Module):
        _sp_plan = make_sp_plan({"shard": (3, 3, 4, 4)}, {"gather": (3, 3)})

        def forward(self, video, audio, video_rope, audio_rope):
            video_length, audio_length = video.shape[1], audio.shape[1]
            tensors = self.shard(*map(pad_tokens, (video, audio, video_rope, audio_rope)))
            ...                                # attention with kv_length=padded_length(video_length or audio_length)
            video, audio = self.gather(video, audio)
            return video[:, :video_length], audio[:, :audio_length]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

from torch import Tensor, nn
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.distributed.parallel_state import get_sequence_parallel_rank, get_sp_group
from vllm_omni.diffusion.distributed.sp_plan import SequenceParallelInput, SequenceParallelOutput
from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available

from port_kit.parallel import fp8_attention
from port_kit.parallel.comm.asymmetric_attention import GatherKVStrategy, GatherQueryStrategy
from port_kit.parallel.comm.fused_sequence_parallel import optimize_strategy
from port_kit.upstream.checks import require

require("attention_layer")
require("sequence_parallel_plan")
require("fp8_attention")

#: Token dimension of all tensors at a boundary.
TOKENS = 1


class SPBoundary(nn.Module):
    """Identity module whose outputs an ``_sp_plan`` shards or gathers."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors; vLLM-Omni's hooks shard or gather them."""
        return tensors


class PaddedAttention(Attention):
    """vLLM-Omni's attention over padded keys: it attends to the first ``kv_length`` keys.

    Under Ulysses and AllGather-KV the kernel's input holds all keys and is sliced. Under Ring, vLLM-Omni slices each
    block according to ``valid_kv_length`` in the metadata. There is no mask, so all backends are supported.

    Args:
        gather: operand with far fewer tokens: ``"kv"``, ``"q"`` or None. It is all-gathered under any kind of sequence
            parallelism.
        disable_kv_quant: keep this attention in its 16-bit dtype under ``diffusion_kv_cache_dtype``. It is True with
            ``gather="q"``: the kernels that merge partial outputs of ranks have no FP8, and one rank gives their
            result.

    Attributes:
        divides_heads: True if Ulysses divides the heads of this layer.
    """

    _kv_length: int | None = None
    parallel_strategy: Any
    ring_runner: Any

    def __init__(
        self, *args: Any, gather: Literal["kv", "q"] | None = None, disable_kv_quant: bool = False, **options: Any
    ) -> None:
        super().__init__(*args, disable_kv_quant=disable_kv_quant or gather == "q", **options)
        self.divides_heads = not (gather or self.skip_sequence_parallel)
        if gather and self.parallel_strategy.enabled and not self.skip_sequence_parallel:
            strategy = GatherKVStrategy if gather == "kv" else GatherQueryStrategy
            self.parallel_strategy = strategy(get_sp_group())
            self.use_ring = False
        self.parallel_strategy = optimize_strategy(self.parallel_strategy)
        self.ring_runner = optimize_strategy(self.ring_runner)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kv_length: int | None = None) -> Tensor:
        """Compute attention.

        Args:
            query: [B, Sq, N, H], this rank's tokens.
            key: [B, Sk, N, H], this rank's tokens.
            value: [B, Sk, N, H], this rank's tokens.
            kv_length: unpadded keys of the complete sequence, over all ranks; None without padding.

        Returns:
            [B, Sq, N, H].
        """
        self._kv_length = kv_length
        metadata = None
        if kv_length is not None and self.use_ring:
            metadata = AttentionMetadata(extra={"valid_kv_length": kv_length})
        return super().forward(query, key, value, metadata).to(query.dtype)

    def _init_kv_cache_quantization(self, config: Any) -> None:
        """Read ``diffusion_kv_cache_dtype``; the kit's kernels are used where vLLM-Omni has none or one scale only."""
        if fp8_attention.is_supported(self.attn_backend, self.head_size):
            self.attention.supports_kv_cache_dtype = lambda dtype, _platform: dtype in (None, "fp8")
        super()._init_kv_cache_quantization(config)

    def _run_local_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None
    ) -> Tensor:
        strategy = self._get_active_parallel_strategy()
        if isinstance(strategy, GatherQueryStrategy):
            return strategy.attend(query, key, value, self._kv_length, self.softmax_scale)
        if self._kv_length is not None:
            key, value = key[:, : self._kv_length], value[:, : self._kv_length]
        if query.is_cuda and attn_metadata is not None and attn_metadata.extra.get("kv_cache_dtype") == "fp8":
            return fp8_attention.attend(query, key, value, self.softmax_scale)
        return super()._run_local_attention(query, key, value, attn_metadata)


def make_sp_plan(
    shard: Mapping[str, Sequence[int]], gather: Mapping[str, Sequence[int]]
) -> dict[str, dict[int, SequenceParallelInput] | list[SequenceParallelOutput]]:
    """Return an ``_sp_plan`` over :class:`SPBoundary` modules.

    Args:
        shard: paths of boundaries that shard, each with the number of dimensions of its tensors.
        gather: paths of boundaries that gather, each with the number of dimensions of its tensors.

    Returns:
        A plan that shards and gathers along dimension 1. Lengths must be multiples of the number of ranks
        (:func:`pad_tokens`): vLLM-Omni's padding does not support Ring.
    """
    plan: dict[str, Any] = {}
    for path, dims in shard.items():
        plan[path] = {
            index: SequenceParallelInput(split_dim=TOKENS, expected_dims=count, split_output=True)
            for index, count in enumerate(dims)
        }
    for path, dims in gather.items():
        plan[path] = [SequenceParallelOutput(gather_dim=TOKENS, expected_dims=count) for count in dims]
    return plan


def sequence_parallel_size() -> int:
    """Return the number of ranks that split a sequence; 1 outside of an engine."""
    if not is_forward_context_available():
        return 1
    config = get_forward_context().omni_diffusion_config
    return int(config.parallel_config.sequence_parallel_size or 1)


def tokens_are_sharded() -> bool:
    """Return True between the boundaries that shard and gather; False on one rank and outside of an engine.

    ``ForwardContext.sp_active`` is also True outside of the boundaries: vLLM-Omni sets ``sp_plan_hooks_applied`` in the
    context of loading, and each request has a new context.
    """
    return is_forward_context_available() and get_forward_context()._sp_shard_depth > 0


def pad_tokens(x: Tensor) -> Tensor:
    """Zero-pad dimension 1 to a multiple of :func:`sequence_parallel_size`."""
    missing = -x.shape[TOKENS] % sequence_parallel_size()
    if missing == 0:
        return x
    return nn.functional.pad(x, (0, 0) * (x.ndim - TOKENS - 1) + (0, missing))


def padded_length(length: int) -> int | None:
    """Return ``length`` if :func:`pad_tokens` pads it, else None: the ``kv_length`` of attention."""
    return length if length % sequence_parallel_size() else None


def segment_counts(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the tokens of each consecutive segment of a sequence on each rank, without padding.

    Args:
        lengths: tokens per segment, in order, before padding; the sequence is padded once, at its end.

    Returns:
        Per segment: its tokens on each rank; they sum to its length.
    """
    size = sequence_parallel_size()
    share = -(-sum(lengths) // size)
    edges = list(accumulate(lengths, initial=0))
    return [
        tuple(max(0, min(stop, (rank + 1) * share) - max(start, rank * share)) for rank in range(size))
        for start, stop in pairwise(edges)
    ]


def local_segment_lengths(lengths: Sequence[int], local: int) -> tuple[int, ...]:
    """Return the local length of each consecutive segment of a sequence.

    Padding is part of the last segment.

    Args:
        lengths: tokens per segment, in order, before padding.
        local: tokens on this rank.

    Returns:
        Tokens per segment on this rank; they sum to ``local``.
    """
    size = sequence_parallel_size()
    padded = sum(lengths) + -sum(lengths) % size
    start = 0 if local == padded else get_sequence_parallel_rank() * local
    edges, position = [0], 0
    for length in lengths[:-1]:
        position += length
        edges.append(min(max(position - start, 0), local))
    return tuple(b - a for a, b in zip(edges, [*edges[1:], local], strict=True))
