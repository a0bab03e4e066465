"""State of a request while it is served: prepared, then denoised step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from port_kit.pipeline.guidance_gate import GuidanceEffect


class Solver(Protocol):
    """A scheduler of diffusers with its steps set; it keeps the history of one tensor.

    Attributes:
        timesteps: ``[steps]``, falling.
    """

    timesteps: Tensor

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """Return the sample after the step; calls follow the order of :attr:`timesteps`."""


@dataclass(frozen=True)
class PreparedRequest:
    """A checked request with its decoded conditioning media.

    Attributes:
        request: the port's request, a dataclass with at least ``steps``, ``seed``, ``outputs`` and ``scales``, and
            ``guidance_gate_step`` if requests may set it.
        lengths: size of the output in latents; the port chooses the type.
        tokens: token ids per text.
        images: float32 (3, H, W) each, in [-1, 1].
        audios: float32 (samples,) each.
        magnitudes: names of settings that may make an output overflow.
    """

    request: Any
    lengths: Any = None
    tokens: Sequence[list[int]] = ()
    images: Sequence[Tensor] = ()
    audios: Sequence[Tensor] = ()
    magnitudes: Sequence[str] = ()

    def split_outputs(self) -> list[Self]:
        """Return one request per output; output i has the seed of this request plus i."""
        requests = (replace(self.request, seed=self.request.seed + i, outputs=1) for i in range(self.request.outputs))
        return [replace(self, request=request) for request in requests]


@dataclass
class DenoiseState:
    """One output between two denoising steps.

    Attributes:
        prepared: the request.
        conditioning: encoded conditioning, equal for all steps.
        latents: per modality, in the order of the transformer's outputs.
        solvers: one per modality; they compute on the CPU.
        timesteps: (steps,) on the device, copied once.
        index: of the next step.
        guidance: its effect in the last step before the gate of the request, None until then.
    """

    prepared: PreparedRequest
    conditioning: Any
    latents: dict[str, Tensor]
    solvers: Mapping[str, Solver]
    timesteps: Tensor
    index: int = 0
    guidance: GuidanceEffect | None = None

    @classmethod
    def begin(
        cls,
        prepared: PreparedRequest,
        conditioning: Any,
        latents: dict[str, Tensor],
        build_solver: Callable[[], Solver],
    ) -> DenoiseState:
        """Return the state before the first step."""
        solvers = {name: build_solver() for name in latents}
        first = next(iter(latents))
        return cls(prepared, conditioning, latents, solvers, solvers[first].timesteps.to(latents[first].device))

    @property
    def is_done(self) -> bool:
        """True if all steps have been made."""
        return self.index >= len(self.timesteps)

    @property
    def steps_done(self) -> tuple[int, int]:
        """Number of steps that have been made, and of all steps."""
        return self.index, len(self.timesteps)

    @property
    def timestep(self) -> Tensor:
        """Timestep of the next step, 0-dim on the device."""
        return self.timesteps[self.index]

    def advance(self, guided: Sequence[Tensor]) -> None:
        """Step every solver along its guided prediction, in the order of :attr:`latents`."""
        for (name, latent), prediction in zip(list(self.latents.items()), guided, strict=True):
            solver = self.solvers[name]
            self.latents[name] = solver.step(prediction, solver.timesteps[self.index], latent, return_dict=False)[0]
        self.index += 1


@dataclass(frozen=True)
class StepResult:
    """Result of one denoising step, for the ``on_step`` callback of a pipeline.

    Attributes:
        index: of the step.
        guided: predictions after guidance, per modality.
        latents: after the step, per modality.
    """

    index: int
    guided: Mapping[str, Tensor]
    latents: Mapping[str, Tensor]


def without_media(prompt: Any) -> Any:
    """Return a prompt of a request without its ``multi_modal_data``."""
    if not isinstance(prompt, Mapping):
        return prompt
    return {name: value for name, value in prompt.items() if name != "multi_modal_data"}


def draw_noise(shape: tuple[int, ...], seed: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw (1, \\*shape) on the device from a new generator; results differ between kinds of devices."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn((1, *shape), generator=generator, device=device, dtype=dtype)
