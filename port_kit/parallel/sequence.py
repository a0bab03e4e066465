"""Sequence parallelism for models with several token streams of any length.

vLLM-Omni shards tensors where a transformer's ``_sp_plan`` says so. Three traps make it hard to get right, and this
module holds the remedy of each:

* a plan that does not match is only a warning, and the result stays right without any sharding. Put a
  :class:`SPBoundary` where streams are split and another where they are gathered, and name them with
  :func:`make_sp_plan`; ``port-kit verify parallel`` then proves that tokens were sharded;
* lengths must divide by the number of ranks, and padding is visible to attention. Pad with :func:`pad_tokens`, tell
  every attention the true length, and cut after the gather. :class:`PaddedAttention` drops the padded keys by
  length, without a mask, under Ulysses, Ring, AllGather-KV and Ulysses x Ring;
* attention over keys that every rank holds whole (text) must skip sequence parallelism:
  ``PaddedAttention(..., skip_sequence_parallel=True)``.

A transformer with two streams looks like this::

    class MyTransformer(nn.Module):
        _sp_plan = make_sp_plan({"shard": (3, 3, 4, 4)}, {"gather": (3, 3)})

        def forward(self, video, audio, video_rope, audio_rope):
            video_length, audio_length = video.shape[1], audio.shape[1]
            tensors = self.shard(*map(pad_tokens, (video, audio, video_rope, audio_rope)))
            ...                                # attention gets kv_length=video_length or audio_length
            video, audio = self.gather(video, audio)
            return video[:, :video_length], audio[:, :audio_length]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.distributed.parallel_state import get_sequence_parallel_rank, get_sp_group
from vllm_omni.diffusion.distributed.sp_plan import SequenceParallelInput, SequenceParallelOutput
from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available

from port_kit.parallel.comm.asymmetric_attention import GatherKVStrategy, GatherQueryStrategy
from port_kit.parallel.comm.fused_sequence_parallel import optimize_strategy

#: Dimension that holds the tokens in every tensor that crosses a boundary.
TOKENS = 1


class SPBoundary(nn.Module):
    """Identity over tensors: a place in the module tree where a plan splits or gathers them."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors; vLLM-Omni's hooks shard or gather what is returned."""
        return tensors


class PaddedAttention(Attention):
    """vLLM-Omni's attention over keys whose tail is padding: it attends to the first ``kv_length`` keys only.

    Ulysses and AllGather-KV hold all keys when the kernel runs, so cutting there is exact. Ring circulates blocks and
    cuts each one itself, told by the metadata. No mask is made, so every backend can run it.

    Args:
        gather: which side has few tokens, if one has: it is sent, whatever the kind of sequence parallelism.
    """

    _kv_length: int | None = None
    parallel_strategy: Any
    ring_runner: Any

    def __init__(self, *args: Any, gather: Literal["kv", "q"] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        if gather and self.parallel_strategy.enabled and not self.skip_sequence_parallel:
            strategy = GatherKVStrategy if gather == "kv" else GatherQueryStrategy
            self.parallel_strategy = strategy(get_sp_group())
            self.use_ring = False
        self.parallel_strategy, self.ring_runner = (
            optimize_strategy(self.parallel_strategy),
            optimize_strategy(self.ring_runner),
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kv_length: int | None = None) -> Tensor:
        """Attend.

        Args:
            query: [B, Sq, N, H], this rank's tokens.
            key: [B, Sk, N, H], this rank's tokens.
            value: as ``key``.
            kv_length: keys of the whole sequence before padding, over all ranks; None where nothing is padded.

        Returns:
            [B, Sq, N, H].
        """
        self._kv_length = kv_length
        metadata = None
        if kv_length is not None and self.use_ring:
            metadata = AttentionMetadata(extra={"valid_kv_length": kv_length})
        return super().forward(query, key, value, metadata).to(query.dtype)

    def _run_local_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None
    ) -> Tensor:
        strategy = self._get_active_parallel_strategy()
        if isinstance(strategy, GatherQueryStrategy):
            return strategy.attend(query, key, value, self._kv_length, self.softmax_scale)
        if self._kv_length is not None:
            key, value = key[:, : self._kv_length], value[:, : self._kv_length]
        return super()._run_local_attention(query, key, value, attn_metadata)


def make_sp_plan(
    shard: Mapping[str, Sequence[int]], gather: Mapping[str, Sequence[int]]
) -> dict[str, dict[int, SequenceParallelInput] | list[SequenceParallelOutput]]:
    """Return an ``_sp_plan`` over :class:`SPBoundary` modules.

    Args:
        shard: paths of boundaries that split, each with the number of dimensions of every tensor it is given.
        gather: paths of boundaries that gather, in the same form.

    Returns:
        A plan that splits and gathers all of these tensors along dimension 1. Lengths must already divide by the
        number of ranks (:func:`pad_tokens`): the framework's own padding does not work with Ring.
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
    """Return how many ranks share a sequence; 1 outside of an engine."""
    if not is_forward_context_available():
        return 1
    config = get_forward_context().omni_diffusion_config
    return int(config.parallel_config.sequence_parallel_size or 1)


def pad_tokens(x: Tensor) -> Tensor:
    """Zero-pad dimension 1 up to a multiple of :func:`sequence_parallel_size`; without sharding, a no-op."""
    missing = -x.shape[TOKENS] % sequence_parallel_size()
    if missing == 0:
        return x
    return nn.functional.pad(x, (0, 0) * (x.ndim - TOKENS - 1) + (0, missing))


def padded_length(length: int) -> int | None:
    """Return ``length`` where :func:`pad_tokens` would pad it, else None: what attention takes as ``kv_length``."""
    return length if length % sequence_parallel_size() else None


def local_segment_lengths(lengths: Sequence[int], local: int) -> tuple[int, ...]:
    """Cut consecutive runs of the whole sequence down to what this rank holds of each.

    Padding at the end counts as part of the last run.

    Args:
        lengths: tokens of each run, in order, before padding.
        local: tokens that this rank holds.

    Returns:
        Tokens of each run on this rank; they sum to ``local``.
    """
    size = sequence_parallel_size()
    whole = sum(lengths) + -sum(lengths) % size
    start = 0 if local == whole else get_sequence_parallel_rank() * local
    edges, position = [0], 0
    for length in lengths[:-1]:
        position += length
        edges.append(min(max(position - start, 0), local))
    return tuple(b - a for a, b in zip(edges, [*edges[1:], local], strict=True))
