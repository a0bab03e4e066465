"""The scheduler of MOVA: Euler steps along a flow, whose noise levels are looked up in the training schedule.

A step goes from the level of its own timestep to that of the next one. Both are the levels of the nearest of the
training timesteps, so they differ by up to 2e-3 from those that the timesteps were computed from. The networks get the
exact timesteps.

Arithmetic is float32 throughout, as in the original: the timesteps are inputs of the networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from port_kit.errors import ConfigError
from port_kit.escape import quoted

#: Options of the original's JSON of which only one value is supported.
REQUIRED_VALUES: Mapping[str, Any] = {
    "exponential_shift": False,
    "shift_terminal": None,
    "inverse_timesteps": False,
    "reverse_sigmas": False,
    "extra_one_step": False,
}


@dataclass(frozen=True)
class Schedule:
    """Noise levels, from a ``scheduler_config.json``.

    Attributes:
        shift: a larger shift spends more steps on coarse structure.
        sigma_max: first level before the shift.
        sigma_min: last level before the shift.
        training_steps: number of training timesteps; a timestep is a level times this.
    """

    shift: float
    sigma_max: float = 1.0
    sigma_min: float = 0.003 / 1.002
    training_steps: int = 1000

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Schedule:
        """Read the original's JSON.

        Raises:
            ConfigError: it has no shift, or an option has an unsupported value.
        """
        for name, required in REQUIRED_VALUES.items():
            if values.get(name, required) != required:
                raise ConfigError(
                    f"{name} of the scheduler is {quoted(values[name])}; only {quoted(required)} is supported"
                )
        names = {"shift": "shift", "sigma_max": "sigma_max", "sigma_min": "sigma_min"}
        names["training_steps"] = "num_train_timesteps"
        given = {name: values[original] for name, original in names.items() if original in values}
        if "shift" not in given:
            raise ConfigError("the scheduler's config has no 'shift'")
        return cls(**given)

    def sigmas(self, steps: int, shift: float | None = None) -> Tensor:
        """Return the levels of a number of steps, ``[steps]``, falling; ``shift`` replaces that of the schedule."""
        shift = self.shift if shift is None else shift
        base = torch.linspace(self.sigma_max, self.sigma_min, steps, dtype=torch.float32, device="cpu")
        return shift * base / (1 + (shift - 1) * base)

    def timesteps(self, steps: int, shift: float | None = None) -> Tensor:
        """Return the timesteps of a number of steps, ``[steps]``, falling."""
        return self.sigmas(steps, shift) * self.training_steps

    def nearest_sigmas(self, timesteps: Tensor) -> Tensor:
        """Return the training levels nearest to timesteps ``[steps]``, and 0 for the end, ``[steps + 1]``."""
        training = self.timesteps(self.training_steps)
        nearest = (timesteps[:, None] - training).abs().argmin(1)
        return torch.cat((self.sigmas(self.training_steps)[nearest], timesteps.new_zeros(1)))


class FlowEuler:
    """Solver of one modality.

    Args:
        schedule: noise levels of the training.
        steps: number of denoising steps.
        shift: replaces that of the schedule for the timesteps, but not for the training levels.

    Attributes:
        timesteps: ``[steps]``, inputs of the networks.
        sigmas: ``[steps + 1]``, levels between which the steps go.
    """

    def __init__(self, schedule: Schedule, steps: int, *, shift: float | None = None) -> None:
        self.timesteps = schedule.timesteps(steps, shift)
        self.sigmas = schedule.nearest_sigmas(self.timesteps)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """Return the sample after the step of a timestep, in its own dtype."""
        index = int((self.timesteps == timestep).nonzero()[0])
        change = self.sigmas[index + 1] - self.sigmas[index]
        return (sample + model_output.to(sample.dtype) * change.item(),)
