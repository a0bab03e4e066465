"""Forked workers: results, evidence of sharding, and failures."""

from __future__ import annotations

import gc
import os
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from port_kit.errors import ParallelError, PortKitError
from port_kit.runtime.plugin import register_pipelines
from port_kit.runtime.single_process import single_rank
from port_kit.testing.workers import PrewarmedRanks, RankResult, Request, run_workers, warm_up
from tests.helpers import raises

REQUEST = Request("a cat", {"num_inference_steps": 2, "seed": 3})


def local_lengths(pipeline: nn.Module) -> tuple[int, int]:
    """How many video and audio tokens this rank's blocks saw."""
    return pipeline.transformer.local_lengths


@pytest.fixture(scope="module")
def single(toy_model: Path) -> RankResult:
    """One rank's result, the reference."""
    return run_workers(toy_model, [REQUEST], setup=register_pipelines, probe=local_lengths)[0]


def test_one_rank_runs_the_pipeline(single: RankResult) -> None:
    video, audio = single.outputs[0]
    assert video.shape == (5, 160, 160, 3)
    assert audio.shape == (3333,)
    assert torch.isfinite(video).all() and video.std() > 0.01
    assert single.probe == (48, 16)


@pytest.mark.parametrize(
    ("layout", "lengths"),
    [
        ({"ulysses_degree": 2}, (24, 8)),
        ({"ring_degree": 2}, (24, 8)),
        ({"tensor_parallel_size": 2}, (48, 16)),
        ({"cfg_parallel_size": 2}, (48, 16)),
    ],
    ids=["ulysses", "ring", "tp", "cfg"],
)
def test_two_ranks_agree_with_one(
    layout: dict[str, int], lengths: tuple[int, int], single: RankResult, toy_model: Path
) -> None:
    results = run_workers(
        toy_model, [REQUEST], config={"parallel_config": layout}, setup=register_pipelines, probe=local_lengths
    )
    assert [result.rank for result in results] == [0, 1]
    assert [result.probe for result in results] == [lengths, lengths]
    for result in results:
        for mine, reference in zip(result.outputs[0], single.outputs[0], strict=True):
            torch.testing.assert_close(mine, reference, rtol=0, atol=2e-5)


def test_a_failing_request_names_rank_and_cause(toy_model: Path) -> None:
    with raises("worker_failed", "rank 0", "this prompt fails") as caught:
        run_workers(toy_model, [Request("fail")], setup=register_pipelines)
    assert "pipeline.py" in caught.value.details["traceback"]


def test_keep_going_serves_the_next_request(toy_model: Path) -> None:
    result = run_workers(toy_model, [Request("fail"), REQUEST], setup=register_pipelines, keep_going=True)[0]
    assert [type(error) for error in result.errors] == [ValueError, type(None)]
    assert result.outputs[0] is None and result.outputs[1] is not None


def test_an_error_of_the_kit_arrives_with_all_attributes(toy_model: Path) -> None:
    def refuse() -> None:
        raise PortKitError("no", code="port_invalid", hint="do this", name="x")

    with pytest.raises(ParallelError) as caught:
        run_workers(toy_model, [REQUEST], setup=refuse)
    cause = caught.value.__cause__
    assert isinstance(cause, PortKitError)
    assert (cause.code, cause.hint, cause.details) == ("port_invalid", "do this", {"name": "x"})


def test_a_dead_rank_is_reported_and_no_process_leaks(toy_model: Path) -> None:
    before = _children()
    with raises("worker_died", "3"):
        run_workers(toy_model, [REQUEST], setup=lambda: os._exit(3))
    assert _children() <= before


def test_a_rank_that_hangs_is_killed(toy_model: Path) -> None:
    before = _children()
    with raises("worker_timeout"):
        run_workers(toy_model, [REQUEST], setup=lambda: time.sleep(3600), timeout=1.0)
    assert _children() <= before


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def _spawned() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_spawned_ranks_wait_for_a_case_and_equal_forked_ones(single: RankResult, toy_model: Path) -> None:
    seen: list[str] = []

    def setup() -> None:
        """A closure: arguments of a spawned process are passed by value."""
        register_pipelines()
        seen.append("set up")

    def probe(pipeline: nn.Module) -> tuple[tuple[int, int], list[str]]:
        return local_lengths(pipeline), seen

    with closing(PrewarmedRanks(2)) as prewarmed:
        waiting_processes = _spawned()
        layout = {"parallel_config": {"ulysses_degree": 2}}
        results = run_workers(
            toy_model,
            [REQUEST],
            config=layout,
            setup=setup,
            probe=probe,
            start="spawn",
            prewarmed=prewarmed,
            timeout=900.0,
        )
    assert [result.probe for result in results] == [((24, 8), ["set up"])] * 2
    for mine, reference in zip(results[0].outputs[0], single.outputs[0], strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=2e-5)
    assert len(waiting_processes) == 2
    assert not any(process.is_running() for process in waiting_processes)


def test_unused_ranks_are_ended() -> None:
    prewarmed = PrewarmedRanks(1)
    (process,) = _spawned()
    prewarmed.close()
    assert not process.is_running()


def test_an_uncollected_process_group_does_not_hang_a_fork(toy_model: Path) -> None:
    """Its threads are not in the fork, and collecting it there would wait for them."""
    warm_up()
    gc.collect()
    gc.disable()
    try:
        with single_rank():
            cycle: list[object] = [torch.distributed.group.WORLD]
            cycle.append(cycle)
        del cycle
        (result,) = run_workers(toy_model, [REQUEST], setup=register_pipelines, timeout=60.0)
    finally:
        gc.enable()
    assert result.outputs[0] is not None
