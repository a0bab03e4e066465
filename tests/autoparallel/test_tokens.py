"""Sharding and gathering of token streams over threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from port_kit.autoparallel.exchange import ThreadExchange, ThreadWorld
from port_kit.autoparallel.plan import TokenAxis
from port_kit.autoparallel.tokens import Tokens
from port_kit.errors import ParallelError


def _on_ranks(count: int, work: Callable[[Tokens], Any]) -> list[Any]:
    """Run a function with the tokens of each rank; return the results by rank."""
    world, results = ThreadWorld(count), [None] * count

    def run(rank: int) -> None:
        tokens = Tokens(ThreadExchange(world, rank))
        tokens.lengths = {"text": 7, "image": 20}
        results[rank] = work(tokens)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("streams", [("text",), ("text", "image"), ("image", "text")])
def test_gather_undoes_shard(ranks: int, streams: tuple[str, ...]) -> None:
    whole = torch.randn(2, sum({"text": 7, "image": 20}[s] for s in streams), 3)

    def work(tokens: Tokens) -> tuple[Tensor, Tensor]:
        own = tokens.shard(whole, 1, streams)
        return own, tokens.gather(own, 1, streams)

    for own, gathered in _on_ranks(ranks, work):
        assert own.shape[1] == sum(-(-{"text": 7, "image": 20}[s] // ranks) for s in streams)
        assert torch.equal(gathered, whole)


def test_join_undoes_spread() -> None:
    whole = torch.randn(1, 27, 4)
    (result, _) = _on_ranks(
        2, lambda tokens: tokens.join(tokens.spread(whole, 1, ["text", "image"]), 1, ["text", "image"])
    )
    assert torch.equal(result, whole)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_rows_with_halo_convolve_as_the_whole(ranks: int) -> None:
    grid, kernel = torch.randn(1, 2, 5, 4), torch.randn(2, 2, 3, 3)
    expected = torch.nn.functional.conv2d(grid, kernel, padding=1)

    def work(tokens: Tokens) -> Tensor:
        tokens.rows = {"image": 5}
        own, before = tokens.with_halo(tokens.shard(grid, 2, ["image"], 2), 2, "image", 1, 2)
        rows = torch.nn.functional.conv2d(own, kernel, padding=1)
        valid = tokens.valid("image", tokens.exchange.rank, 2)
        return rows.narrow(2, before, valid)

    assert torch.allclose(torch.cat(_on_ranks(ranks, work), 2), expected, atol=1e-6)


def test_lengths_are_learned_from_complete_arguments() -> None:
    axes = [
        TokenAxis(path="joint", dim=0, streams=("text", "image")),
        TokenAxis(path="x", dim=1, streams=("image",)),
        TokenAxis(path="count", dim=-1, streams=("text",)),
    ]
    tokens = Tokens(ThreadExchange(ThreadWorld(2), 0))
    tokens.learn(axes, {"joint": torch.zeros(13, 2), "x": torch.zeros(1, 8, 2), "count": 5})
    assert tokens.lengths == {"image": 8, "text": 5}
    own = tokens.shard_all(axes, {"joint": torch.arange(13), "x": torch.zeros(1, 8, 2), "count": 5})
    assert own["joint"].tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert own["x"].shape == (1, 4, 2) and own["count"] == 3


def test_other_lengths_are_an_error() -> None:
    tokens = Tokens(ThreadExchange(ThreadWorld(2), 0))
    tokens.lengths = {"image": 8}
    with pytest.raises(ParallelError) as caught:
        tokens.shard(torch.zeros(1, 9, 2), 1, ["image"])
    assert caught.value.code == "plan_tokens"
