"""The samplers: steps of the original, and properties for any number of steps."""

from __future__ import annotations

import pytest
import torch

from port_kit.errors import InputError
from port_kit.models.wan.pipeline.scheduler import SOLVERS, build_scheduler


def test_four_steps_of_unipc_are_the_references() -> None:
    scheduler = build_scheduler("unipc", steps=4, shift=5.0)
    assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.timesteps.tolist() == [999, 937, 833, 624]
    assert scheduler.sigmas[-1] == 0.0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 300])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_an_exact_prediction_arrives_at_the_data(solver: str, steps: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(steps)
    data, noise = (torch.randn(1, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    scheduler = build_scheduler(solver, steps=steps, shift=shift)
    first = scheduler.sigmas[0].double()
    sample = first * noise + (1 - first) * data
    for timestep in scheduler.timesteps:
        sample = scheduler.step(noise - data, timestep, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, data, atol=1e-4, rtol=0)


def test_repeated_timesteps_begin_at_the_first() -> None:
    scheduler = build_scheduler("unipc", steps=600)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    scheduler.step(torch.zeros(1, 2), scheduler.timesteps[0], torch.zeros(1, 2), return_dict=False)
    assert scheduler.step_index == 1


def test_video_and_sound_have_independent_histories() -> None:
    output, sample = torch.ones(1, 2), torch.zeros(1, 2)
    alone = _run(build_scheduler(steps=3), output, sample)
    video, audio = build_scheduler(steps=3), build_scheduler(steps=3)
    _run(audio, output * 5, sample)
    assert torch.equal(_run(video, output, sample), alone)


@pytest.mark.parametrize(
    ("solver", "steps", "shift"),
    [
        ("heun", 4, 5.0),
        ("unipc", 0, 5.0),
        ("euler", 1001, 5.0),
        ("dpm++", 4, 0.0),
        ("unipc", 4, float("nan")),
    ],
)
def test_what_cannot_be_sampled_is_refused(solver: str, steps: int, shift: float) -> None:
    with pytest.raises(InputError) as caught:
        build_scheduler(solver, steps=steps, shift=shift)
    assert caught.value.code == "sampling_invalid"
    assert caught.value.hint


def _run(scheduler: object, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    for timestep in scheduler.timesteps:
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    return sample
