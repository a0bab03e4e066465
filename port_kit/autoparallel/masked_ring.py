"""Ring attention with a mask, which vLLM-Omni's Ring does not support.

Each block of keys is attended to with its columns of the mask, in float32 matrix products over chunks of queries.
Blocks are merged by their log-sum-exp. Unmasked attention uses vLLM-Omni's kernels instead.

Shape suffixes: B batch, N heads, Q queries, K keys of one block, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from vllm_omni.diffusion.distributed.comm import RingComm

from port_kit.autoparallel.tokens import Tokens
from port_kit.upstream.checks import require

require("ring_communication")

#: Streams of the queries, and of the keys.
Streams = tuple[Sequence[str], Sequence[str]]
#: Added to the scores of masked keys: finite, so that a block without unmasked keys has a log-sum-exp.
_MASKED = -1e30
#: Queries whose scores are in memory at once.
_CHUNK = 1024


def masked_ring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    streams: Streams,
    tokens: Tokens,
    group: object,
) -> Tensor:
    """Attend to the keys of all ranks.

    Args:
        query: [B, Q, N, H], this rank's tokens.
        key: [B, K, n, H], this rank's tokens; n divides N.
        value: as ``key``.
        mask: [B or 1, N or 1, all queries or 1, all keys]; boolean, or added to the scores.
        scale: softmax scale.
        streams: streams of the queries and of the keys.
        tokens: lengths of the streams.
        group: ring group.

    Returns:
        [B, Q, N, H]. Queries without unmasked keys get zeros.
    """
    ring = RingComm(group)
    bias = _own_rows(_as_bias(mask), streams[0], tokens)
    q_BNQH = query.transpose(1, 2).float()
    out, lse = torch.zeros_like(q_BNQH), q_BNQH.new_full(q_BNQH.shape[:-1], 2 * _MASKED)
    block = key.contiguous(), value.contiguous()
    for turn in range(ring.world_size):
        current = block
        if turn + 1 < ring.world_size:
            block = ring.send_recv(current[0]), ring.send_recv(current[1])
            ring.commit()
        columns = _columns(bias, streams[1], (ring.rank - turn) % ring.world_size, tokens)
        new_out, new_lse = _attend(q_BNQH, *current, columns, scale)
        total = torch.logaddexp(lse, new_lse)
        out = out * (lse - total).exp().unsqueeze(-1) + new_out * (new_lse - total).exp().unsqueeze(-1)
        lse = total
        if turn + 1 < ring.world_size:
            ring.wait()
    out = out.masked_fill((lse < _MASKED / 2).unsqueeze(-1), 0.0)
    return out.transpose(1, 2).to(query.dtype)


def fits(mask: Tensor, streams: Streams, tokens: Tokens) -> bool:
    """Return True if a mask covers all keys, and all queries or none in particular."""
    queries, keys = (tokens.total(each) for each in streams)
    return mask.dim() == 4 and mask.shape[-1] == keys and mask.shape[-2] in (1, queries)


def _as_bias(mask: Tensor) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, _MASKED)
    return mask.float().clamp(min=_MASKED)


def _own_rows(bias: Tensor, streams: Sequence[str], tokens: Tokens) -> Tensor:
    return bias if bias.shape[-2] == 1 else tokens.shard(bias, bias.dim() - 2, streams)


def _columns(bias: Tensor, streams: Sequence[str], rank: int, tokens: Tokens) -> Tensor:
    """Return the columns of the keys that a rank holds; those of its padding are masked."""
    parts, start = [], 0
    for stream in streams:
        share, valid = tokens.local(stream), tokens.valid(stream, rank)
        own = bias.narrow(-1, start + min(rank * share, tokens.lengths[stream]), valid)
        parts.append(torch.nn.functional.pad(own, (0, share - valid), value=_MASKED))
        start += tokens.lengths[stream]
    return torch.cat(parts, -1)


def _attend(q_BNQH: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return outputs [B, N, Q, H] and log-sum-exp [B, N, Q]."""
    repeat = q_BNQH.shape[1] // key.shape[2]
    k_BNHK, v_BNKH = key.float().permute(0, 2, 3, 1), value.float().transpose(1, 2)
    if repeat > 1:
        k_BNHK, v_BNKH = k_BNHK.repeat_interleave(repeat, 1), v_BNKH.repeat_interleave(repeat, 1)
    parts = []
    for rows, own_bias in _chunks(q_BNQH, bias):
        scores = torch.matmul(rows * scale, k_BNHK) + own_bias
        lse = scores.logsumexp(-1, keepdim=True)
        parts.append((torch.matmul((scores - lse).exp(), v_BNKH), lse.squeeze(-1)))
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _chunks(q_BNQH: Tensor, bias: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, q_BNQH.shape[2], _CHUNK):
        rows = q_BNQH[:, :, start : start + _CHUNK]
        yield rows, bias if bias.shape[-2] == 1 else bias[:, :, start : start + _CHUNK]
