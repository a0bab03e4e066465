"""Real ranks of vLLM's parallel layers: rank-local reads give the result of the stream, and read own parts only."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from port_kit.testing.workers import run_workers
from tests.remap import sharded_pipeline as sharded
from tests.remap.sharded_pipeline import EXPERTS, FFN, HEAD, HEADS, KV_HEADS, SHAPES, WORDS, Filled

ITEM = 2  # bytes of a bfloat16
PADDED = 128  # vLLM pads a vocabulary to multiples of 64 before it shards it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shard files, q, k and v in different ones."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "transformer").mkdir()
    tensors = checkpoint()
    for at in range(2):
        held = dict(list(tensors.items())[at::2])
        save_file(held, folder / f"transformer/model-{at}.safetensors")
    (folder / "transformer/config.json").write_text("{}")
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "ShardedPipeline", "_diffusers_version": "0.40.0"})
    )
    return folder


@cache
def checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


@cache
def ranks(folder: Path, size: int) -> list[Filled]:
    config = {"dtype": torch.bfloat16, "parallel_config": {"tensor_parallel_size": size}}
    return [
        result.probe for result in run_workers(folder, [], config=config, setup=sharded.register, probe=sharded.filled)
    ]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rank_local_reads_leave_what_the_stream_leaves(model: Path, size: int) -> None:
    found = ranks(model, size)
    assert len(found) == size
    for one in found:
        assert one.differing == () and one.unwritten == () and one.names_agree


@pytest.mark.parametrize("size", [2, 4])
def test_the_ranks_together_hold_the_checkpoint(model: Path, size: int) -> None:
    states, given = [one.state for one in ranks(model, size)], checkpoint()
    q, kv = HEADS * HEAD // size, max(1, KV_HEADS // size) * HEAD
    replicas = max(1, size // KV_HEADS)
    assert torch.equal(torch.cat([state["qkv.weight"][:q] for state in states]), given["l.q.weight"])
    for rank, state in enumerate(states):
        at = rank // replicas * kv
        assert torch.equal(state["qkv.weight"][q : q + kv], given["l.k.weight"][at : at + kv])
        assert torch.equal(state["qkv.bias"][q + kv :], given["l.v.bias"][at : at + kv])
    rows = FFN // size
    assert torch.equal(torch.cat([state["gate_up.weight"][:rows] for state in states]), given["l.gate.weight"])
    assert torch.equal(torch.cat([state["up_gate.weight"][rows:] for state in states]), given["l.both.weight"][:FFN])
    assert torch.equal(torch.cat([state["o.weight"] for state in states], 1), given["l.o.weight"])
    assert torch.equal(torch.cat([state["wide.weight"] for state in states]), given["l.wide.weight"].T)
    turned = torch.cat(given["l.turned.weight"].chunk(2)[::-1])
    assert torch.equal(torch.cat([state["turned.weight"] for state in states]), turned)
    downs = torch.cat([state["experts.routed_experts.w2_weight"] for state in states], 2)
    assert torch.equal(downs, torch.stack([given[f"l.experts.{n}.w2.weight"] for n in range(EXPERTS)]))
    for name in ("words.weight", "head.weight", "head.bias"):
        words = torch.cat([state[name] for state in states])
        assert len(words) == PADDED
        assert torch.equal(words[:WORDS], given[f"l.{name}"]) and not words[WORDS:].any()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_reads_its_share_and_names_what_it_reads_whole(model: Path, size: int) -> None:
    sizes = {name: math.prod(shape) * ITEM for name, shape in SHAPES.items()}
    replicated = {"l.o.bias", "l.norm.weight"}  # every rank holds all of these
    words = {name for name, shape in SHAPES.items() if shape[0] == WORDS}
    for rank, one in enumerate(ranks(model, size)):
        assert one.bytes_whole == sum(sizes.values())
        # the reorder moves rows across ranks: read completely
        assert {name.split(".")[1] for name in one.read_whole} <= {"turned"}
        expected = sum(
            count // (1 if name in replicated or name in one.read_whole else _ranks_of(name, size))
            for name, count in sizes.items()
            if name not in words
        )
        # padding is never read: a rank with padding only reads no byte of the vocabulary
        start, stop = (min(WORDS, at * PADDED // size) for at in (rank, rank + 1))
        expected += sum(sizes[name] * (stop - start) // WORDS for name in words)
        assert one.bytes_read == expected
        assert size == 1 or one.bytes_read < one.bytes_whole


def _ranks_of(name: str, size: int) -> int:
    """Return the number of parts of a tensor: key heads are replicated if there are fewer than ranks."""
    return min(size, KV_HEADS) if name.split(".")[1] in "kv" else size
