"""The optimize_strategy forms of Ulysses and Ring against vLLM-Omni's own, on processes of a gloo group."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.backends.ring.ring_kernels import pytorch_attn_forward
from vllm_omni.diffusion.attention.parallel.ring import RingParallelAttention
from vllm_omni.diffusion.attention.parallel.ulysses import UlyssesParallelAttention

from port_kit.parallel.comm import fused_sequence_parallel
from port_kit.parallel.comm.fused_sequence_parallel import ExchangedContext, FusedRing, FusedUlysses, optimize_strategy
from port_kit.runtime.patches import install_worker_fixes
from tests.helpers import run_ranks


def ulysses(rank: int, ranks: int) -> None:
    """Trade heads for tokens and back, with values that are a slice, of head dims that divide into words and do not."""
    group = SimpleNamespace(ulysses_group=dist.group.WORLD, ulysses_world_size=ranks, ring_world_size=1)
    theirs = UlyssesParallelAttention(group, 2, 1, False)  # type: ignore[arg-type]
    ours = optimize_strategy(UlyssesParallelAttention(group, 2, 1, False))  # type: ignore[arg-type]
    assert type(ours) is FusedUlysses
    for batch, tokens, size, dtype in ((1, 5, 16, torch.bfloat16), (2, 3, 6, torch.bfloat16), (2, 4, 8, torch.float32)):
        heads = 2 * ranks
        fused = torch.randn(batch, tokens, 3 * heads * size, generator=torch.Generator().manual_seed(rank)).to(dtype)
        given = [part.unflatten(-1, (heads, size)) for part in fused.chunk(3, -1)]
        mine, expected = ours.pre_attention(*given, None), theirs.pre_attention(*given, None)
        assert isinstance(mine[4], ExchangedContext)
        assert all(a.equal(b) for a, b in zip(mine[:3], expected[:3], strict=True))
        assert ours.post_attention(mine[0], mine[4]).equal(theirs.post_attention(expected[0], expected[4]))
        assert ours.post_attention(mine[2], mine[4]).equal(given[2])


def with_option(rank: int, ranks: int) -> None:
    """An option of vLLM-Omni's method is passed to it, whether the installed release has it or not."""
    group = SimpleNamespace(ulysses_group=dist.group.WORLD, ulysses_world_size=ranks, ring_world_size=1)
    strategy = optimize_strategy(UlyssesParallelAttention(group, 2, 1, False))  # type: ignore[arg-type]
    given = [torch.zeros(1, 4, 2 * ranks, 8) for _ in range(3)]
    assert isinstance(strategy.pre_attention(*given, None, defer_joint=False)[4], ExchangedContext)
    known = "defer_joint" in inspect.signature(UlyssesParallelAttention.pre_attention).parameters
    with nullcontext() if known else pytest.raises(TypeError, match="defer_joint"):
        assert not isinstance(strategy.pre_attention(*given, None, defer_joint=True)[4], ExchangedContext)


def uneven(rank: int, ranks: int) -> None:
    """Heads that do not divide are refused as vLLM-Omni refuses them."""
    group = SimpleNamespace(ulysses_group=dist.group.WORLD, ulysses_world_size=ranks, ring_world_size=1)
    strategy = optimize_strategy(UlyssesParallelAttention(group, 2, 1, False))  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        strategy.pre_attention(*(torch.zeros(1, 4, ranks + 1, 8) for _ in range(3)), None)


def ring(rank: int, ranks: int) -> None:
    """Keys go round; here the blocks' attention is SDPA's, since FlashAttention runs on GPUs only."""
    install_worker_fixes()  # vLLM-Omni's ring has no kernel for CPUs
    fused_sequence_parallel.flash_kernel = lambda _device: sdpa
    fused_sequence_parallel.flash_attention = sdpa
    group: Any = SimpleNamespace(ring_group=dist.group.WORLD, ring_world_size=ranks)
    ours, theirs = optimize_strategy(RingParallelAttention(group)), RingParallelAttention(group)
    assert type(ours) is FusedRing
    for length in (None, 5 * ranks - 1, 4):  # no padding, padding, and ranks with padding only
        generator = torch.Generator().manual_seed(rank)
        query, key, value = torch.randn(3, 2, 5, 4, 16, generator=generator).bfloat16()
        metadata = None if length is None else AttentionMetadata(extra={"valid_kv_length": length})
        mine = ours.run_attention(query, key, value, metadata, softmax_scale=0.3)
        expected = theirs.run_attention(query, key, value, metadata, softmax_scale=0.3)
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, expected, rtol=8e-3, atol=1e-3)


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Substitute of FlashAttention on a CPU."""
    out, lse = pytorch_attn_forward(query, key, value, softmax_scale=scale, causal=False)
    return out.contiguous(), lse[..., : query.shape[1]]


def in_group(rank: int, work: Callable[[int, int], None], ranks: int, folder: str) -> None:
    """Run ``work`` as one rank of a group."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=f"file://{folder}/store")
    try:
        work(rank, ranks)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("work", "ranks"), [(ulysses, 2), (ulysses, 3), (with_option, 2), (uneven, 2), (ring, 2), (ring, 3)]
)
def test_the_fused_form_equals_vllm_omnis(work: Callable[[int, int], None], ranks: int, tmp_path: Path) -> None:
    gc.collect()  # a process group in the garbage would be waited for in the children
    run_ranks(in_group, (work, ranks, str(tmp_path)), ranks)


def test_other_strategies_are_unchanged() -> None:
    other = SimpleNamespace()
    assert optimize_strategy(other) is other
    assert optimize_strategy(None) is None
