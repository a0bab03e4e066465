"""Models with two transformers: one for high and one for low noise.

Both are components of kind ``transformer``. A step runs one of them: :meth:`NoiseExperts.at` names it, and the branches
of the step have that name as :data:`~port_kit.parallel.cfg_batching.EXPERT`. So vLLM-Omni sees two denoisers, of which
offload keeps one on the device, HSDP shards both, and Cache-DiT has contexts for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Context = TypeVar("Context")

#: Components, as vLLM-Omni's pipelines of Wan 2.2 call them.
HIGH_NOISE, LOW_NOISE = "transformer", "transformer_2"


@dataclass(frozen=True)
class NoiseExperts:
    """Choice of a transformer by the noise of a step.

    Attributes:
        boundary: smallest timestep of the transformer for high noise.
    """

    boundary: float

    def at(self, timestep: float) -> str:
        """Return the name of the transformer for a timestep."""
        return LOW_NOISE if timestep < self.boundary else HIGH_NOISE


@dataclass
class ExpertContext(Generic[Context]):
    """Values of a request that are computed once per transformer, such as projections of its texts.

    Timesteps fall, so a request changes its transformer once: only the context of the current one is kept.

    Attributes:
        make: returns a new context.
    """

    make: Callable[[], Context]
    kept: dict[str, Context] = field(default_factory=dict)

    def of(self, expert: str) -> Context:
        """Return the context of a transformer; forget that of another one."""
        if expert not in self.kept:
            self.kept = {expert: self.make()}
        return self.kept[expert]
