"""Ulysses and Ring with fewer bytes moved on the GPU: vLLM-Omni's strategies, their copies and sums made in one pass.

What is sent between ranks is what vLLM-Omni's own strategies send; on one host it goes through mailboxes
(:mod:`~port_kit.parallel.peers`), so that copy engines carry it. Around it vLLM-Omni's move a long sequence's queries,
keys, values and outputs several times more: Ulysses through element-wise transposes, twice for outputs; Ring through
float32 copies of every block's output, four passes a block. At 22,528 tokens on two H100 that was 5 % of a step.

:class:`~port_kit.parallel.sequence.LengthTrimmedAttention` puts them in place of what :func:`lean` is given; where they
have nothing to add (float32, joint or uneven heads, a kernel that is not FlashAttention-3), they do as vLLM-Omni does.

Shape suffixes: B batch, S tokens of this rank, P ranks, N heads, n heads of one rank after the exchange, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
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
from port_kit.parallel.peers import Peers, peers_of

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
        peers = peers_of(self._ulysses_pg, query)
        if peers is not None and query.shape == key.shape == value.shape:
            exchanged = _post_heads(peers, (query, key, value))
        else:
            exchanged = [self._gather_tokens(x, ranks) for x in (query, key, value)]
        return *exchanged, attn_metadata, Exchanged(self.name)

    def post_attention(self, attn_output: Tensor, ctx: ParallelAttentionContext | None) -> Tensor:
        """Trade tokens for heads: ``[B, P * S, n, H]`` becomes ``[B, S, N, H]``."""
        if not isinstance(ctx, Exchanged):
            return super().post_attention(attn_output, ctx)
        ranks = torch.distributed.get_world_size(self._ulysses_pg)
        parts = attn_output.unflatten(1, (ranks, -1)).transpose(0, 1)
        peers = peers_of(self._ulysses_pg, attn_output)
        if peers is not None:
            return _post_tokens(peers, parts)
        received = self._trade(parts)
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


def _post_heads(peers: Peers, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Trade heads for tokens through mailboxes, for all tensors at once: ``[B, S, N, H]`` each, alike."""
    batch, tokens, heads, size = tensors[0].shape
    dtype = tensors[0].dtype
    boxes = peers.take((len(tensors), peers.size, batch, tokens, heads // peers.size, size), dtype)
    for index, x in enumerate(tensors):
        parts_PBSnH = words(x).unflatten(2, (peers.size, -1)).permute(2, 0, 1, 3, 4)
        for rank in peers.others:  # packed here, so that a copy engine can carry it
            boxes[rank][index, peers.rank].copy_(unwords(parts_PBSnH[rank].contiguous(), dtype))
        copy_words(boxes[peers.rank][index, peers.rank], x.unflatten(2, (peers.size, -1))[:, :, peers.rank])
    peers.meet()
    return [received.transpose(0, 1).flatten(1, 2) for received in boxes[peers.rank].unbind(0)]


def _post_tokens(peers: Peers, parts_PBSnH: Tensor) -> Tensor:
    """Trade tokens for heads through mailboxes; return ``[B, S, N, H]``."""
    ranks, batch, tokens, heads, size = parts_PBSnH.shape
    boxes = peers.take(parts_PBSnH.shape, parts_PBSnH.dtype)
    for rank in peers.others:
        boxes[rank][peers.rank].copy_(parts_PBSnH[rank])
    peers.meet()
    whole = parts_PBSnH.new_empty(batch, tokens, ranks, heads, size)
    for rank in range(ranks):
        received = parts_PBSnH[rank] if rank == peers.rank else boxes[peers.rank][rank]
        copy_words(whole[:, :, rank], received)
    return whole.flatten(2, 3)


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
        ranks = ring.world_size
        peers = peers_of(self._sp_group.ring_group, key, depth=3)
        carrier = _Relay(ring, key, value) if peers is None else _Post(peers, key, value)
        out = lse = None
        for turn in range(ranks):
            is_last = turn + 1 == ranks
            if not is_last:
                carrier.start()
            valid = ring_kv_block_valid_length(length, key.shape[1], (ring.rank - turn) % ranks, ranks)
            if valid:
                new_out, new_lse = flash_attention(query, key[:, :valid], value[:, :valid], scale)
                if out is None or lse is None:
                    out, lse = new_out, new_lse
                else:
                    out, lse = merge(out, lse, new_out, new_lse, query.dtype if is_last else torch.float32)
            if not is_last:
                key, value = carrier.finish()
        assert out is not None  # not all keys of all ranks are padding
        return out.to(query.dtype)


class _Relay:
    """Brings the next block's keys and values from the rank before, which had them before."""

    def __init__(self, ring: RingComm, key: Tensor, value: Tensor) -> None:
        self.ring, self.block = ring, (key, value)

    def start(self) -> None:
        """Begin to bring the next block, while the last is attended to."""
        key, value = self.block
        self.block = self.ring.send_recv(key), self.ring.send_recv(value)
        self.ring.commit()

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the block's keys and values."""
        self.ring.wait()
        return self.block


class _Post:
    """Brings the next block's keys and values from the rank whose they are, on a stream beside the current one."""

    def __init__(self, peers: Peers, key: Tensor, value: Tensor) -> None:
        self.peers, self.own = peers, (key, value)
        self.turn = 0
        self.stream = _beside(torch.cuda.current_stream(key.device)) if key.is_cuda else None

    def start(self) -> None:
        """Send this rank's own block to where its turn has come."""
        peers = self.peers
        self.turn += 1
        self.boxes = peers.take((2, *self.own[0].shape), self.own[0].dtype)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for box, tensor in zip(self.boxes[(peers.rank + self.turn) % peers.size], self.own, strict=True):
                box.copy_(tensor)
            peers.meet()

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the block's keys and values; the current stream waits for them."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        key, value = self.boxes[self.peers.rank]
        return key, value


@cache
def _beside(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    return torch.cuda.Stream(stream.device)


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


def copy_words(to: Tensor, x: Tensor) -> None:
    """Copy between tensors of one shape and dtype, in words where both divide into them."""
    wide, given = words(to), words(x)
    if wide.dtype == given.dtype:
        wide.copy_(given)
    else:
        to.copy_(x)


def unwords(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values again that :func:`words` made words of."""
    return x.view(dtype)
