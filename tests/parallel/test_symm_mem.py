"""Peer buffers give the results of collectives, on processes of different speeds.

On a CPU, the memory is a file that the ranks share. On a GPU, it is PyTorch's symmetric memory.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from math import prod
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

from port_kit.parallel.comm import asymmetric_attention, cuda_stream_ops, fused_sequence_parallel, symm_mem
from port_kit.parallel.comm.fused_sequence_parallel import FusedRing, optimize_strategy
from port_kit.parallel.comm.symm_mem import PeerBuffers
from port_kit.runtime.patches import install_worker_fixes
from tests.helpers import run_ranks


class SharedMemory:
    """Memory in files that all ranks map, with gloo's barrier."""

    made = 0

    def __init__(self, size: int, folder: Path) -> None:
        SharedMemory.made += 1
        self.size = size
        self.files = [folder / f"{SharedMemory.made}-{rank}" for rank in range(dist.get_world_size())]
        self.files[dist.get_rank()].write_bytes(bytes(size))
        dist.barrier()

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Map a rank's file."""
        whole = torch.from_file(str(self.files[rank]), shared=True, size=self.size, dtype=torch.uint8)
        return whole[: prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))

    def barrier(self) -> None:
        """Wait for all ranks, and then a moment, so that some read late."""
        dist.barrier()
        time.sleep(random.random() * 0.004)


def peer_buffers(folder: str, num_buffers: int = 2) -> PeerBuffers:
    """Return the buffers of all processes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return PeerBuffers(rank, size, lambda bytes_: SharedMemory(bytes_, Path(folder)), num_buffers)


def gathered_and_summed(rank: int, ranks: int, folder: str) -> None:
    """Join and add tensors of changing shapes, many times over, each rank at its own speed."""
    post = peer_buffers(folder)
    for step in range(40):
        shape = (1 + step % 2, 2 + step % 3, 4)
        every = [torch.full(shape, float(step * ranks + place)).bfloat16() for place in range(ranks)]
        for dim in range(3):
            assert post.gather(every[rank], dim).equal(torch.cat(every, dim))
        if ranks == 2:
            own, other = post.exchange_partial_sums(every[rank])
            assert own.equal(every[rank])
            assert other.equal(every[1 - rank])
    if ranks != 2:
        with pytest.raises(ValueError, match=f"got {ranks}"):
            post.exchange_partial_sums(torch.zeros(1))


def one_buffer_is_too_few(rank: int, ranks: int, folder: str) -> None:
    """A fast rank overwrites data that another has not read: the purpose of ``num_buffers``."""
    post, wrong = peer_buffers(folder, num_buffers=1), 0
    for step in range(60):
        joined = post.gather(torch.full((64,), float(step)), 0)
        wrong += not joined.eq(step).all()
    seen = [None] * ranks
    dist.all_gather_object(seen, wrong)
    assert any(seen)


def ulysses(rank: int, ranks: int, folder: str) -> None:
    """Heads for tokens and back, as vLLM-Omni's collective trades them; keys of fewer heads go its own way."""
    post = peer_buffers(folder)
    fused_sequence_parallel.get_peer_buffers = lambda *_args, **_options: post
    group = SimpleNamespace(ulysses_group=dist.group.WORLD, ulysses_world_size=ranks, ring_world_size=1)
    theirs = UlyssesParallelAttention(group, 2, 1, False)  # type: ignore[arg-type]
    ours = optimize_strategy(UlyssesParallelAttention(group, 2, 1, False))  # type: ignore[arg-type]
    for batch, tokens, size, dtype in ((1, 5, 16, torch.bfloat16), (2, 3, 6, torch.bfloat16), (2, 4, 8, torch.float32)):
        heads = 2 * ranks
        fused = torch.randn(batch, tokens, 3 * heads * size, generator=torch.Generator().manual_seed(rank)).to(dtype)
        given = [part.unflatten(-1, (heads, size)) for part in fused.chunk(3, -1)]
        for key, value in ((given[1], given[2]), (given[1][:, :, :ranks], given[2][:, :, :ranks])):
            before = symm_mem.transfer_stats["calls"]
            mine, expected = (
                ours.pre_attention(given[0], key, value, None),
                theirs.pre_attention(given[0], key, value, None),
            )
            assert all(a.equal(b) for a, b in zip(mine[:3], expected[:3], strict=True))
            output = mine[0].clone()
            assert ours.post_attention(output, mine[4]).equal(theirs.post_attention(output, expected[4]))
            assert symm_mem.transfer_stats["calls"] - before == 1 + (key.shape == given[0].shape)


def ring(rank: int, ranks: int, folder: str) -> None:
    """Blocks that their owners send are those that are handed on; with and without padding, over and over."""
    post, asked = peer_buffers(folder, num_buffers=3), []
    fused_sequence_parallel.flash_kernel = lambda _device: sdpa
    fused_sequence_parallel.flash_attention = sdpa
    group: Any = SimpleNamespace(ring_group=dist.group.WORLD, ring_world_size=ranks)
    ours = optimize_strategy(RingParallelAttention(group))
    assert type(ours) is FusedRing
    generator = torch.Generator().manual_seed(rank)
    for length in (None, 5 * ranks - 1, 4, None):
        given = torch.randn(3, 2, 5, 4, 16, generator=generator).bfloat16().unbind(0)
        metadata = None if length is None else AttentionMetadata(extra={"valid_kv_length": length})
        results = []
        for found in (post, None):
            fused_sequence_parallel.get_peer_buffers = lambda *_args, num_buffers, found=found: (
                asked.append(num_buffers) or found
            )
            results.append(ours.run_attention(*given, metadata, softmax_scale=0.3))
        assert results[0].equal(results[1])
        assert results[0].abs().max() > 0
    assert set(asked) == {3}


def gathered_operands(rank: int, ranks: int, folder: str) -> None:
    """The shorter operand of an attention is gathered through peer buffers."""
    post = peer_buffers(folder)
    group: Any = SimpleNamespace(device_group=dist.group.WORLD, world_size=ranks, rank_in_group=rank)
    asymmetric_attention.get_peer_buffers = lambda *_args: post
    whole = torch.randn(3, 1, 4 * ranks, 2, 8, generator=torch.Generator().manual_seed(0))
    query, key, value = whole.chunk(ranks, 2)[rank]
    _, keys, values, _, _ = asymmetric_attention.GatherKVStrategy(group).pre_attention(query, key, value, None)
    assert keys.equal(whole[1])
    assert values.equal(whole[2])
    strategy = asymmetric_attention.GatherQueryStrategy(group)
    queries, *_ = strategy.pre_attention(query, key, value, None)
    assert queries.equal(whole[0])
    mine = strategy.post_attention(strategy.attend(queries, key, value, None, 0.3), None)
    expected, _ = sdpa(query, whole[1], whole[2], 0.3)
    torch.testing.assert_close(mine, expected)


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Substitute of FlashAttention on a CPU."""
    out, lse = pytorch_attn_forward(query, key, value, softmax_scale=scale, causal=False)
    return out.contiguous(), lse[..., : query.shape[1]]


def on_gpus(rank: int, ranks: int, folder: str) -> None:
    """Gather and reduce like NCCL, on two streams at once, with growing buffers."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=ranks, init_method=f"file://{folder}/store")
    group = dist.group.WORLD
    streams = [torch.cuda.Stream() for _ in range(2)]
    for step in range(60):
        given = torch.full((1 + step * 2000, 16), float(step * ranks + rank), device="cuda", dtype=torch.bfloat16)
        every = [torch.empty_like(given) for _ in range(ranks)]
        dist.all_gather(every, given)
        results = []
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                post = symm_mem.get_peer_buffers(group, given)
                assert post is not None, "these GPUs do not reach each other"
                joined = post.gather(given, 0).clone()
                if rank == step % ranks:
                    torch.cuda._sleep(1_000_000)  # one rank is late by a millisecond or so
                results.append((joined, sum(post.exchange_partial_sums(given)) if ranks == 2 else joined[:1]))
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        for joined, total in results:
            assert joined.equal(torch.cat(every))
            assert ranks != 2 or total.equal(every[0] + every[1])
    dist.destroy_process_group()


def in_group(rank: int, work: Callable[[int, int, str], None], ranks: int, folder: str) -> None:
    """Run ``work`` as one rank of a group."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    install_worker_fixes()  # vLLM-Omni's ring has no kernel for CPUs
    random.seed(rank)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=f"file://{folder}/store")
    try:
        work(rank, ranks, folder)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("work", [gathered_and_summed, one_buffer_is_too_few, ulysses, ring, gathered_operands])
def test_peer_buffers(work: Callable[[int, int, str], None], ranks: int, tmp_path: Path) -> None:
    run_ranks(in_group, (work, ranks, str(tmp_path)), ranks)


@pytest.mark.gpu
def test_peer_buffers_on_gpus(tmp_path: Path) -> None:
    ranks = torch.cuda.device_count()
    assert ranks >= 2, "this test needs two GPUs"
    run_ranks(on_gpus, (ranks, str(tmp_path)), ranks, "spawn")


def test_a_cpu_has_no_peer_buffers() -> None:
    assert symm_mem.get_peer_buffers(SimpleNamespace(), torch.zeros(1)) is None  # type: ignore[arg-type]


def test_missing_parts_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(cuda_stream_ops.logger, "warning", said.append)  # other tests leave loggers in any state
    for absent in ("cuda", "cuda.bindings"):
        monkeypatch.setattr(
            cuda_stream_ops, "find_spec", lambda name, absent=absent: None if name == absent else object()
        )
        assert not cuda_stream_ops.is_installed.__wrapped__()
        assert "pip install cuda-bindings" in said.pop()
    monkeypatch.setattr(cuda_stream_ops, "find_spec", lambda _name: object())
    assert cuda_stream_ops.is_installed.__wrapped__()
    assert not said


class FakeDriver:
    """The part of ``cuda.bindings.driver`` that is used, which notes its calls; no GPU is needed."""

    CUstreamBatchMemOpType = SimpleNamespace(
        CU_STREAM_MEM_OP_WRITE_VALUE_32="write", CU_STREAM_MEM_OP_WAIT_VALUE_32="wait"
    )

    def __init__(self, result: int) -> None:
        self.result, self.calls = result, []

    @staticmethod
    def CUstreamBatchMemOpParams() -> SimpleNamespace:
        return SimpleNamespace(writeValue=SimpleNamespace(), waitValue=SimpleNamespace())

    def cuStreamBatchMemOp(self, stream: int, count: int, operations: list[Any], flags: int) -> tuple[int]:
        parts = [one.writeValue if one.operation == "write" else one.waitValue for one in operations]
        self.calls.append((stream, count, [(part.operation, part.address, part.value) for part in parts], flags))
        return (self.result,)


@pytest.fixture
def words() -> tuple[list[Tensor], list[Tensor]]:
    """Signals of two peers."""
    return [torch.zeros(1, dtype=torch.int32) for _ in "ab"], [torch.zeros(1, dtype=torch.int32) for _ in "ab"]


def test_signals_are_set_awaited_and_cleared(
    words: tuple[list[Tensor], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver(0)
    monkeypatch.setattr(cuda_stream_ops, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    signals = cuda_stream_ops.PeerSignals(*words)
    signals.exchange()
    signals.exchange()
    theirs, own = ([word.data_ptr() for word in side] for side in words)
    expected = [("write", place, 1) for place in theirs] + [("wait", place, 1) for place in own]
    expected += [("write", place, 0) for place in own]
    assert driver.calls == [(7, 6, expected, 0)] * 2, "a graph replays the same call"


def test_an_error_of_the_driver_is_reported(
    words: tuple[list[Tensor], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_stream_ops, "_driver", lambda: FakeDriver(801))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    with pytest.raises(RuntimeError, match="cuStreamBatchMemOp.*801.*PORT_KIT_DISABLE_SYMM_MEM=1"):
        cuda_stream_ops.PeerSignals(*words).exchange()


class NoMemory:
    """Memory of one rank alone, which notes its barriers in ``order``."""

    def __init__(self, order: list[NoMemory]) -> None:
        self.order = order

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return new memory."""
        return torch.empty(shape, dtype=dtype)

    def barrier(self) -> None:
        """Note it."""
        self.order.append(self)


@pytest.mark.parametrize("num_buffers", [2, 3])
@pytest.mark.parametrize("exchanges", range(7))
def test_each_round_begins_with_the_first_buffer(num_buffers: int, exchanges: int) -> None:
    """No memory is used by two exchanges in a row, rounds included: a signal would be lost."""
    order: list[NoMemory] = []
    buffers = PeerBuffers(0, 1, lambda _size: NoMemory(order), num_buffers)
    for _ in range(3):
        for _ in range(exchanges):
            buffers.gather(torch.zeros(3), 0)
        buffers.complete_round()
        assert len(order) % num_buffers == 0
    assert len(set(map(id, order))) == (num_buffers if exchanges else 0)
    assert all(memory is order[place % num_buffers] for place, memory in enumerate(order))


def test_a_failed_capture_leaves_the_next_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[NoMemory] = []
    buffers = PeerBuffers(0, 1, lambda _size: NoMemory(order))
    monkeypatch.setattr(symm_mem, "_created", [buffers])
    buffers.gather(torch.zeros(1), 0)
    with pytest.raises(KeyError), symm_mem.restored_on_error():
        buffers.gather(torch.zeros(1), 0)
        raise KeyError
    buffers.gather(torch.zeros(1), 0)
    first, failed, second = order
    assert failed is second is not first
    assert symm_mem.allocated_memory() == [first, second]
