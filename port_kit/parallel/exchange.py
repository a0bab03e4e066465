"""Ulysses and Ring with fewer bytes moved on the GPU: vLLM-Omni's strategies, their copies and sums made in one pass.

What is sent between ranks is what vLLM-Omni's own strategies send. Around it they move a long sequence's queries, keys,
values and outputs several times more: Ulysses through element-wise transposes, twice for outputs; Ring through float32
copies of every block's output, four passes a block. At 22,528 tokens on two H100 that was a twentieth of a step each.

:class:`~port_kit.parallel.sequence.LengthTrimmedAttention` puts them in place of what :func:`lean` is given; where they
have nothing to add (float32, joint or uneven heads, a kernel that is not FlashAttention-3), they do as vLLM-Omni does.

Shape suffixes: B batch, S tokens of this rank, P ranks, N heads, n heads of one rank after the exchange, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm_omni.diffusion.attention.backends.ring.ring_kernels import flash_attn3_func_forward
from vllm_omni.diffusion.attention.backends.ring.ring_utils import ring_kv_block_valid_length
from vllm_omni.diffusion.attention.parallel.base import ParallelAttentionContext
from vllm_omni.diffusion.attention.parallel.ring import RingParallelAttention, _can_use_fa3
from vllm_omni.diffusion.attention.parallel.ulysses import UlyssesParallelAttention
from vllm_omni.diffusion.distributed.comm import RingComm
from vllm_omni.diffusion.forward_context import get_ulysses_mode

from port_kit.parallel.merge import merge

if TYPE_CHECKING:
    from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata

#: Copies go in words of this type, 16 bytes: eight times fewer than values of bfloat16.
WORD = torch.complex128


@dataclass(frozen=True)
class Exchanged(ParallelAttentionContext):
    """Says that the queries were exchanged here, so that the output is exchanged back here."""


class LeanUlysses(UlyssesParallelAttention):
    """Ulysses with one copy for each of queries, keys, values and outputs."""

    def pre_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None
    ) -> tuple[Any, ...]:
        """Trade heads for tokens: ``[B, S, N, H]`` becomes ``[B, P * S, n, H]``."""
        ranks = torch.distributed.get_world_size(self._ulysses_pg)
        uneven = any(x.shape[2] % ranks for x in (query, key, value))
        options = self._use_sync or self._ulysses_a2a_permute or get_ulysses_mode(default="strict") != "strict"
        if uneven or options or not _is_plain(attn_metadata):
            return super().pre_attention(query, key, value, attn_metadata)
        return *(self._gather_tokens(x, ranks) for x in (query, key, value)), attn_metadata, Exchanged(self.name)

    def post_attention(self, attn_output: Tensor, ctx: ParallelAttentionContext | None) -> Tensor:
        """Trade tokens for heads: ``[B, P * S, n, H]`` becomes ``[B, S, N, H]``."""
        if not isinstance(ctx, Exchanged):
            return super().post_attention(attn_output, ctx)
        ranks = torch.distributed.get_world_size(self._ulysses_pg)
        received = self._trade(attn_output.unflatten(1, (ranks, -1)).transpose(0, 1))
        return unwords(words(received).permute(1, 2, 0, 3, 4).flatten(2, 3), attn_output.dtype)

    def _gather_tokens(self, x_BSNH: Tensor, ranks: int) -> Tensor:
        parts = words(x_BSNH).unflatten(2, (ranks, -1)).permute(2, 0, 1, 3, 4).contiguous()
        return self._trade(unwords(parts, x_BSNH.dtype)).transpose(0, 1).flatten(1, 2)

    def _trade(self, parts: Tensor) -> Tensor:
        """Send part i to rank i; return what the ranks sent, in their order."""
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        torch.distributed.all_to_all_single(received, parts, group=self._ulysses_pg)
        return received


class LeanRing(RingParallelAttention):
    """Ring whose blocks are put together in one pass each."""

    def run_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_metadata: AttentionMetadata | None,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attend to the keys of all ranks, which go round; see vLLM-Omni's method."""
        flash = self.attn_backend_pref is None or self.attn_backend_pref.lower() == "flash_attn"
        flash = flash and query.dtype != torch.float32 and _can_use_fa3(query.device)
        if causal or not flash or not _is_plain(attn_metadata):
            options = {"softmax_scale": softmax_scale, "causal": causal}
            return super().run_attention(query, key, value, attn_metadata, **options)
        length = attn_metadata.extra.get("valid_kv_length") if attn_metadata is not None else None
        scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        return self._go_round(query.contiguous(), key.contiguous(), value.contiguous(), length, scale)

    def _go_round(self, query: Tensor, key: Tensor, value: Tensor, length: int | None, scale: float) -> Tensor:
        ring = RingComm(self._sp_group.ring_group)
        out = lse = None
        for turn in range(ring.world_size):
            if turn + 1 < ring.world_size:
                following = ring.send_recv(key), ring.send_recv(value)
                ring.commit()
            block = (ring.rank - turn) % ring.world_size
            valid = ring_kv_block_valid_length(length, key.shape[1], block, ring.world_size)
            if valid:
                new_out, new_lse = flash_attention(query, key[:, :valid], value[:, :valid], scale)
                is_last = turn + 1 == ring.world_size
                if out is None or lse is None:
                    out, lse = new_out, new_lse
                else:
                    out, lse = merge(out, lse, new_out, new_lse, query.dtype if is_last else torch.float32)
            if turn + 1 < ring.world_size:
                ring.wait()
                key, value = following
        assert out is not None  # not all keys of all ranks are padding
        return out.to(query.dtype)


def _is_plain(metadata: AttentionMetadata | None) -> bool:
    """Whether an attention has no mask and no joint tokens: at most the length of its keys is said."""
    if metadata is None:
        return True
    given = (metadata.attn_mask, metadata.joint_attn_mask, metadata.joint_query, metadata.joint_key)
    return all(tensor is None for tensor in given) and metadata.extra.keys() <= {"valid_kv_length"}


def flash_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return FlashAttention-3's output ``[B, S, N, H]`` and log-sum-exp, float32 ``[B, N, S]``."""
    out, lse = flash_attn3_func_forward(
        query,
        key,
        value,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    )
    return out, lse[..., : query.shape[1]]  # some kernels pad it


def lean(strategy: Any) -> Any:
    """Return the lean form of vLLM-Omni's strategy, or the strategy itself where there is none."""
    if type(strategy) is UlyssesParallelAttention:
        dims = strategy._scatter_idx, strategy._gather_idx
        return LeanUlysses(strategy._sp_group, *dims, strategy._use_sync, strategy._ulysses_a2a_permute)
    if type(strategy) is RingParallelAttention:
        return LeanRing(strategy._sp_group, strategy.attn_backend_pref, strategy.attn_backend_explicit)
    return strategy


def words(x: Tensor) -> Tensor:
    """Return a view in words of 16 bytes, where the last dimension divides into them."""
    size = WORD.itemsize
    aligned = x.stride(-1) == 1 and all(stride * x.itemsize % size == 0 for stride in x.stride()[:-1])
    fits = x.shape[-1] * x.itemsize % size == 0 and x.storage_offset() * x.itemsize % size == 0
    return x.view(WORD) if aligned and fits else x


def unwords(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values again that :func:`words` made words of."""
    return x.view(dtype)
