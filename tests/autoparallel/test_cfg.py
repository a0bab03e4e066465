"""Guidance spread over two ranks, which are threads, around small pipelines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from port_kit.autoparallel.cfg import SpreadGuidance, spread_guidance
from port_kit.autoparallel.exchange import ThreadWorld
from port_kit.autoparallel.promise import Promise
from port_kit.errors import ParallelError

STEPS = 4


class ThreadGroup:
    """Ranks that are threads of this process."""

    def __init__(self, world: ThreadWorld, rank: int, size: int) -> None:
        self.world, self.rank, self.size = world, rank, size

    def broadcast(self, tensor: Tensor, source: int) -> None:
        values = self.world.trade(self.rank, tensor.detach().clone() if self.rank == source else None)
        tensor.copy_(values[source])


class Scheduler:
    """A scheduler that subtracts a tenth of the prediction."""

    def set_timesteps(self, steps: int) -> None:
        """Do nothing; diffusers' schedulers have it."""

    def step(self, prediction: Tensor, latents: Tensor) -> Tensor:
        return latents - 0.1 * prediction


class Denoiser(nn.Module):
    """Rows do not depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor]:
        scale = 1.0 if rotary is None else rotary[0].sum() + rotary[1].sum()
        return (torch.tanh(self.linear(x) * scale + text.mean(1, keepdim=True)),)


class Coupled(Denoiser):
    """Rows depend on each other."""

    def forward(self, x: Tensor, text: Tensor, rotary: Any = None) -> tuple[Tensor]:
        return (super().forward(x, text)[0] - text.mean(),)


class Listed(Denoiser):
    """Takes and returns a list with one tensor per row, of different lengths."""

    def forward(self, x: list[Tensor], text: Tensor, rotary: Any = None) -> tuple[list[Tensor]]:  # type: ignore[override]
        return ([torch.tanh(self.linear(one) + row.mean()) for one, row in zip(x, text, strict=True)],)


class Pipeline:
    """A pipeline whose loop is a function."""

    def __init__(self, loop: Callable[[Pipeline, Tensor], Tensor], module: type[nn.Module]) -> None:
        torch.manual_seed(0)
        self.loop, self.transformer, self.scheduler = loop, module(), Scheduler()
        self.texts = torch.randn(3, 5, 4)

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer, "scheduler": self.scheduler, "vae": None}

    def __call__(self) -> Tensor:
        latents = torch.ones(1, 3, 4)
        with torch.inference_mode():
            for _ in range(STEPS):
                latents = self.scheduler.step(self.loop(self, latents), latents)
        return latents


def calls(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """Three branches, each a call, of which views are taken before the last one."""
    first, second, third = (
        pipeline.transformer(latents, text[None])[0][:, :3].unsqueeze(0).squeeze(0) for text in pipeline.texts
    )
    return first + 3 * (second - first) + 2 * (third - first)


def copied(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """Two branches; what looks like a view of the second one is a copy."""
    first, second = (pipeline.transformer(latents, text[None])[0] for text in pipeline.texts[:2])
    return (first + second.transpose(1, 2).reshape(1, 4, 3).transpose(1, 2))[:, :, :4]


def early(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """Each branch is read before the next one begins."""
    return sum(pipeline.transformer(latents, text[None])[0] * 2 for text in pipeline.texts)  # type: ignore[return-value]


def fed(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """The second branch reads the first one."""
    first = pipeline.transformer(latents, pipeline.texts[:1])[0]
    return pipeline.transformer(first, pipeline.texts[1:2])[0]


def rows(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """Three branches in one batch, with a pair of tables that are no rows."""
    rotary = (torch.ones(6, 4), torch.ones(6, 4) * 0.1)
    out = pipeline.transformer(latents.expand(3, -1, -1), pipeline.texts, rotary=rotary)[0]
    first, second, third = out.chunk(3)
    return first + 3 * (second - first) + 2 * (third - first)


def listed(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """Two branches in one call, whose rows are members of lists."""
    first, second = pipeline.transformer([latents[0], latents[0, :2]], pipeline.texts[:2])[0]
    return (first + second.sum())[None]


def run_spread(loop: Any, module: type[nn.Module] = Denoiser, size: int = 2) -> list[tuple[Tensor, SpreadGuidance]]:
    """Run a pipeline twice on each rank; return the second result of each."""
    world = ThreadWorld(size)

    def work(rank: int) -> tuple[Tensor, SpreadGuidance]:
        pipeline = built[rank]
        spread = spread_guidance(pipeline, {"transformer": pipeline.transformer}, ThreadGroup(world, rank, size))
        for _ in range(2):
            spread.computed = 0.0
            with spread.request():
                result = pipeline()
        return result, spread

    built = [Pipeline(loop, module) for _ in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(work, rank) for rank in range(size)]]


@pytest.mark.parametrize("size", [2, 3])
def test_calls_are_dealt_to_ranks(size: int) -> None:
    expected = Pipeline(calls, Denoiser)()
    results = run_spread(calls, size=size)
    for result, _ in results:
        assert torch.equal(result, expected)
    shares = [2.0, 1.0] if size == 2 else [1.0, 1.0, 1.0]
    assert [spread.computed for _, spread in results] == [STEPS * share for share in shares]


def test_a_copy_of_a_promise_has_the_values_of_its_owner() -> None:
    expected = Pipeline(copied, Denoiser)()
    assert all(torch.equal(result, expected) for result, _ in run_spread(copied))


@pytest.mark.parametrize("loop", [early, fed])
def test_a_pipeline_that_reads_early_is_refused(loop: Any) -> None:
    with pytest.raises(ParallelError) as caught:
        run_spread(loop)
    assert caught.value.code == "cfg_early_read"


@pytest.mark.parametrize(("loop", "module"), [(rows, Denoiser), (listed, Listed)])
def test_rows_are_divided(loop: Any, module: type[nn.Module]) -> None:
    expected = Pipeline(loop, module)()
    results = run_spread(loop, module)
    for result, _ in results:
        assert torch.allclose(result, expected, atol=1e-6)
    shares = [2 / 3, 1 / 3] if loop is rows else [0.5, 0.5]
    assert [spread.computed for _, spread in results] == pytest.approx([STEPS * share for share in shares])


def test_rows_that_depend_on_each_other_are_refused() -> None:
    with pytest.raises(ParallelError) as caught:
        run_spread(rows, Coupled)
    assert caught.value.code == "cfg_rows"


def test_a_copied_scheduler_notes_its_steps() -> None:
    pipeline = Pipeline(calls, Denoiser)
    spread = spread_guidance(pipeline, {}, ThreadGroup(ThreadWorld(1), 0, 1))
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.step(torch.ones(1), torch.ones(1))
    assert spread.pending.steps == 1
    assert type(scheduler).__name__ == "Scheduler"


def test_a_promise_is_read_by_numpy_and_by_python() -> None:
    """Every way to read waits for the exchange: without one, the values of another rank would be garbage."""

    def read(pipeline: Pipeline, latents: Tensor) -> Tensor:
        first = pipeline.transformer(latents, pipeline.texts[:1])[0]
        second = pipeline.transformer(latents, pipeline.texts[1:2])[0]
        assert not isinstance(first, Promise) or first.shape == (1, 3, 4)
        return torch.from_numpy(second.numpy().copy()) * float(first.mean())

    expected = Pipeline(read, Denoiser)()
    assert all(torch.equal(result, expected) for result, _ in run_spread(read))
