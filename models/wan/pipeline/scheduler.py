"""Schedulers of DreamID-Omni and Ovi, based on those of diffusers.

Both models predict the flow ``noise - data``. The noise level (sigma) of a step is
``shift * u / (1 + (shift - 1) * u)``; ``u`` decreases linearly over the steps. The original's three solvers start at
different values of ``u``, none of which is a default of diffusers:

========  =============================  ==========================================  =================
solver    diffusers' class               ``u`` of the first step                     timesteps
========  =============================  ==========================================  =================
unipc     UniPCMultistepScheduler        0.999 in float32, the training's last step  int64, truncated
dpm++     DPMSolverMultistepScheduler    1                                           int64, truncated
euler     FlowMatchEulerDiscrete...      1, ends at the shifted first training step  float32
========  =============================  ==========================================  =================

Truncated timesteps are inputs of the network (999, 937, 833, 624 for four steps of unipc); the solver uses the exact
sigma. A scheduler keeps the history of one tensor, so video and audio need one scheduler each.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from port_kit.errors import InputError
from port_kit.escape import quoted

#: Number of steps of the training schedule; a timestep is ``sigma`` times this.
TRAINING_STEPS = 1000
#: Largest noise level of the training schedule, rounded to float32 as in the original.
LARGEST_TRAINING_SIGMA = float(np.float32(1 - 1 / TRAINING_STEPS))
SOLVERS = ("unipc", "dpm++", "euler")


class Scheduler(Protocol):
    """Interface of a scheduler.

    Attributes:
        timesteps: ``[steps]``, inputs of the network, decreasing.
        sigmas: ``[steps + 1]`` float32 noise levels; the last is 0.
    """

    timesteps: torch.Tensor
    sigmas: torch.Tensor

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, return_dict: bool = True
    ) -> tuple[torch.Tensor, ...]:
        """Return the sample at the next noise level; calls must come in the order of ``timesteps``."""


class _FlowDPMSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ that accepts noise levels, like diffusers' UniPC.

    The first level may be 1, with a log signal-to-noise ratio of minus infinity. Both orders of the solver have a
    finite limit there, which torch's arithmetic returns.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
        *,
        sigmas: np.ndarray | None = None,
    ) -> None:
        """Set the noise levels; ``sigmas`` are those before the shift, without the final 0."""
        if sigmas is None:
            super().set_timesteps(num_inference_steps, device, mu, timesteps)
            return
        super().set_timesteps(len(sigmas), device)
        levels = self.config.flow_shift * sigmas / (1 + (self.config.flow_shift - 1) * sigmas)
        self.timesteps = torch.from_numpy(levels * TRAINING_STEPS).to(device=device, dtype=torch.int64)
        self.sigmas = torch.from_numpy(np.append(levels, 0.0).astype(np.float32))


def build_scheduler(
    solver: str = "unipc", *, steps: int = 50, shift: float = 5.0, device: str | torch.device | None = None
) -> Scheduler:
    """Build a scheduler with its steps set, ready for the first :meth:`Scheduler.step`.

    Args:
        solver: one of :data:`SOLVERS`.
        steps: number of denoising steps, 1 to 1000.
        shift: of the noise levels; 1 is linear, a larger shift spends more steps at high noise. It applies when the
            steps are set, as in the original; the ``shift`` of diffusers' constructors gives other levels.
        device: of ``timesteps``; ``sigmas`` are on the CPU.

    Raises:
        InputError: the solver is unknown, or steps or shift are out of range.
    """
    _check(solver, steps, shift)
    scheduler: Any
    if solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAINING_STEPS, shift=shift)
        scheduler.set_timesteps(steps, device=device)
    elif solver == "unipc":
        scheduler = UniPCMultistepScheduler(**_flow_options(shift))
        scheduler.set_timesteps(sigmas=_linear_sigmas(LARGEST_TRAINING_SIGMA, steps), device=device)
    else:
        scheduler = _FlowDPMSolver(**_flow_options(shift))
        scheduler.set_timesteps(sigmas=_linear_sigmas(1.0, steps), device=device)
    # From about 250 steps, truncated timesteps repeat; without this, diffusers would start at the second of two.
    scheduler.set_begin_index(0)
    return scheduler


def _linear_sigmas(first: float, steps: int) -> np.ndarray:
    return np.linspace(first, 0.0, steps + 1)[:-1]


def _flow_options(shift: float) -> dict[str, object]:
    return {
        "num_train_timesteps": TRAINING_STEPS,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
    }


def _check(solver: str, steps: int, shift: float) -> None:
    if solver not in SOLVERS:
        raise InputError(
            f"solver is {quoted(solver)}; expected one of {', '.join(SOLVERS)}",
            code="sampling_invalid",
            hint="use unipc, the default",
        )
    if not 1 <= steps <= TRAINING_STEPS:
        raise InputError(
            f"the number of denoising steps is {steps}; expected 1 to {TRAINING_STEPS}",
            code="sampling_invalid",
            hint="use 50, the default, or fewer for a draft",
        )
    if not (np.isfinite(shift) and shift > 0):
        raise InputError(
            f"shift is {shift}; expected a positive number",
            code="sampling_invalid",
            hint="use 5.0, the default",
        )
