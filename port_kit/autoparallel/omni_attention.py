"""Attention through vLLM-Omni's ``Attention``: Ulysses, Ring and AllGather-KV, or its backend on one rank's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.diffusion.config import set_current_diffusion_config
from vllm_omni.diffusion.distributed.parallel_state import get_sp_group
from vllm_omni.diffusion.forward_context import get_forward_context

from port_kit.autoparallel.masked_ring import fits, masked_ring
from port_kit.autoparallel.plan import AttentionSite
from port_kit.autoparallel.tokens import WHOLE, Tokens
from port_kit.parallel.sequence import PaddedAttention

Span = tuple[int, int]


class StreamAttention(PaddedAttention):
    """vLLM-Omni's attention over keys of several padded streams."""

    _spans: Sequence[Span] | None = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span] | None, kv_length: int | None
    ) -> Tensor:
        """Compute attention.

        Args:
            query: [B, Sq, N, H], this rank's tokens.
            key: [B, Sk, N, H], this rank's tokens.
            value: [B, Sk, N, H], this rank's tokens.
            spans: unpadded ranges of the gathered keys; None without padding or under Ring.
            kv_length: unpadded keys of all ranks under Ring; None without padding.
        """
        self._spans = spans
        return self(query, key, value, kv_length)

    def attend_masked(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Compute attention to the keys for which ``mask`` [B, Sk] is True."""
        self._spans = self._kv_length = None
        return Attention.forward(self, query, key, value, AttentionMetadata(attn_mask=mask)).to(query.dtype)

    def _run_local_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None
    ) -> Tensor:
        if self._spans is not None:
            key, value = (torch.cat([x[:, start:stop] for start, stop in self._spans], 1) for x in (key, value))
        return super()._run_local_attention(query, key, value, attn_metadata)


class OmniKernel:
    """A :class:`~port_kit.autoparallel.sites.Kernel` that builds an attention layer per site and shape.

    Attributes:
        kind: name of the exchange, for counts: ``ulysses``, ``ring``, ``ulysses_ring`` or ``allgather``.
    """

    def __init__(self) -> None:
        parallel = get_forward_context().omni_diffusion_config.parallel_config
        self.ulysses, self.ring = parallel.ulysses_degree, parallel.ring_degree
        names = [name for name, degree in (("ulysses", self.ulysses), ("ring", self.ring)) if degree > 1]
        self.kind = "_".join(names) or "allgather"
        self._layers: dict[tuple[Any, ...], StreamAttention] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        site: AttentionSite,
        tokens: Tokens,
    ) -> Tensor | None:
        """Return the attention of this rank's queries to the keys of all ranks; None if it is not supported."""
        indivisible = query.shape[2] % self.ulysses or key.shape[2] % self.ulysses
        if indivisible or WHOLE in (*site.queries, *site.keys) or value.shape[-1] != query.shape[-1]:
            return None
        if mask is not None:
            return self._masked(query, key, value, mask, scale, site, tokens)
        layer = self._layer(query, key, scale, (site.module, site.index))
        if not _supported(layer):
            return None
        padded = tokens.total(site.keys) != tokens.local_total(site.keys) * tokens.exchange.world
        if not padded:
            return layer.attend(query, key, value, None, None)
        if self.ring == 1:
            return layer.attend(query, key, value, valid_spans(tokens, site.keys), None)
        if not is_trailing(tokens, site.keys) or (self.ulysses > 1 and len(site.keys) > 1):
            return None
        key, value = (valid_first(tokens, x, site.keys) for x in (key, value))
        return layer.attend(query, key, value, None, tokens.total(site.keys))

    def local(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor | None:
        """Return the attention of tokens that this rank holds, by the backend that vLLM-Omni selects for the device.

        Args:
            query: [B, Sq, N, H].
            key: [B, Sk, N, H].
            value: [B, Sk, N, H].
            mask: broadcasts to [B, N, Sq, Sk]; only a boolean mask of keys is supported.
            scale: factor of the scores; None is ``H ** -0.5``.

        Returns:
            [B, Sq, N, H]; None if the backend does not support the operands.
        """
        keys_only = mask is None or (
            mask.dtype is torch.bool and mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1
        )
        if query.dim() != 4 or value.shape[-1] != query.shape[-1] or not keys_only:
            return None
        layer = self._layer(query, key, scale, None)
        if not _supported(layer):
            return None
        if mask is None:
            return layer(query, key, value)
        return layer.attend_masked(query, key, value, mask[:, 0, 0].expand(key.shape[0], key.shape[1]))

    def _masked(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        scale: float | None,
        site: AttentionSite,
        tokens: Tokens,
    ) -> Tensor | None:
        """Attend with a mask under Ring; other kinds exchange heads around the module's own call."""
        streams = site.queries, site.keys
        if self.ring == 1 or self.ulysses > 1 or not fits(mask, streams, tokens):
            return None
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return masked_ring(query, key, value, mask, scale, streams, tokens, get_sp_group().ring_group)

    def _layer(self, query: Tensor, key: Tensor, scale: float | None, site: tuple[str, int] | None) -> StreamAttention:
        """Return the layer of a site, or the one for this rank's tokens."""
        heads, kv_heads, size = query.shape[2], key.shape[2], query.shape[3]
        shape = (site, heads, kv_heads, size, scale)
        if shape not in self._layers:
            self._layers[shape] = _build(
                heads, kv_heads, size, size**-0.5 if scale is None else scale, local=site is None
            )
        return self._layers[shape]


@torch.compiler.disable
def _build(heads: int, kv_heads: int, size: int, scale: float, *, local: bool) -> StreamAttention:
    with set_current_diffusion_config(get_forward_context().omni_diffusion_config):
        return StreamAttention(
            num_heads=heads,
            head_size=size,
            causal=False,
            softmax_scale=scale,
            num_kv_heads=kv_heads,
            # a mask then covers keys only: FlashAttention drops masked queries of self-attention
            role="cross" if local else "self",
            skip_sequence_parallel=local,
            allow_fp32_fallback=True,
        )


def _supported(layer: StreamAttention) -> bool:
    """Return True if the backend of a layer has kernels for its head size."""
    return layer.attn_backend is not None and layer.attn_backend.supports_head_size(layer.head_size)


def valid_spans(tokens: Tokens, streams: Sequence[str]) -> list[Span]:
    """Return the unpadded ranges of a sequence that holds every rank's part, by rank."""
    spans, start = [], 0
    for rank in range(tokens.exchange.world):
        for stream in streams:
            if valid := tokens.valid(stream, rank):
                spans.append((start, start + valid))
            start += tokens.local(stream)
    return spans


def is_trailing(tokens: Tokens, streams: Sequence[str]) -> bool:
    """Return True if all padding is at the end once each rank holds its unpadded tokens first."""
    share, total = tokens.local_total(streams), tokens.total(streams)
    ranks = range(tokens.exchange.world)
    valid = [sum(tokens.valid(stream, rank) for stream in streams) for rank in ranks]
    return valid == [min(max(total - rank * share, 0), share) for rank in ranks]


def valid_first(tokens: Tokens, x: Tensor, streams: Sequence[str]) -> Tensor:
    """Move this rank's padding behind its tokens; the order of keys does not matter to attention."""
    if len(streams) == 1:
        return x
    parts = x.split([tokens.local(stream) for stream in streams], 1)
    valid = [tokens.valid(stream, tokens.exchange.rank) for stream in streams]
    tokens_first = [part[:, :count] for part, count in zip(parts, valid, strict=True)]
    padding = [part[:, count:] for part, count in zip(parts, valid, strict=True)]
    return torch.cat([*tokens_first, *padding], 1)
