"""Guidance gate: from a given step on, the effect of guidance is that of the last step before.

Until the gate, every guidance branch runs, and its last step keeps the difference between the guided prediction and the
prediction of the first branch. From the gate on, only the first branch runs, and the difference is added to its
prediction. Under CFG-parallel, every rank then runs the first branch.

Step caches such as Cache-DiT have a context per branch: after the gate, that of the first branch goes on alone. A rank
without the first branch would compare it with another one, so caches exclude the gate under CFG-parallel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from port_kit.errors import InputError
from port_kit.escape import quoted
from port_kit.pipeline.inputs import check_integer

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from vllm_omni.diffusion.data import OmniDiffusionConfig

    from port_kit.pipeline.request_state import DenoiseState

#: Entry of ``extra_args``: number of steps with all branches.
GUIDANCE_GATE = "guidance_gate_step"


@dataclass(frozen=True)
class GuidanceEffect:
    """Difference between a guided prediction and the prediction of the first branch.

    Attributes:
        differences: per modality, float32.
        dtypes: of the guided predictions.
    """

    differences: tuple[Tensor, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def between(cls, guided: Sequence[Tensor], first: Sequence[Tensor]) -> GuidanceEffect:
        """Return the effect that turned ``first`` into ``guided``."""
        differences = tuple(one.float() - other.float() for one, other in zip(guided, first, strict=True))
        return cls(differences, tuple(one.dtype for one in guided))

    def add_to(self, first: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the guided predictions that follow from those of the first branch."""
        parts = zip(first, self.differences, self.dtypes, strict=True)
        return tuple((one.float() + kept).to(dtype) for one, kept, dtype in parts)


def parse_guidance_gate(options: Mapping[str, Any], steps: int) -> int | None:
    """Return the index of the first step that runs one branch only; None if all steps run all branches.

    Args:
        options: ``extra_args`` of the request.
        steps: of the request.

    Raises:
        InputError: the option is not an integer from 1 to the number of steps.
    """
    value = options.get(GUIDANCE_GATE)
    if value is None:
        return None
    gate = check_integer(GUIDANCE_GATE, value, minimum=1, maximum=steps)
    return gate if gate < steps else None


def check_engine(request: Any, config: OmniDiffusionConfig) -> None:
    """Check that the engine can run a request's gate.

    Raises:
        InputError: ``input_value``; a cache is on, and ranks divide the branches.
    """
    ranks = config.parallel_config.cfg_parallel_size
    if gate_of(request) is not None and config.cache_backend not in (None, "", "none") and ranks > 1:
        raise InputError(
            f"{GUIDANCE_GATE} is {gate_of(request)}, and the server has cache_backend={quoted(config.cache_backend)} "
            f"and cfg_parallel_size={ranks}: ranks without the first branch have no cache for it",
            code="input_value",
            hint=f"omit {GUIDANCE_GATE}, or start the server without cache_backend or with cfg_parallel_size 1",
        )


def gate_of(request: Any) -> int | None:
    """Return the gate of a request; None for one of a port without this option."""
    gate: int | None = getattr(request, GUIDANCE_GATE, None)
    return gate


def is_reused(state: DenoiseState) -> bool:
    """Return True if the next step runs the first branch only."""
    gate = gate_of(state.prepared.request)
    return gate is not None and state.index >= gate


def is_kept(state: DenoiseState) -> bool:
    """Return True if the next step keeps its difference."""
    return gate_of(state.prepared.request) == state.index + 1
