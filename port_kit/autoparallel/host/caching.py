"""Cache-DiT in a hosted pipeline: one context per guidance branch of a step.

A branch is a call of the denoiser; the scheduler's step ends the branches of one step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from port_kit.autoparallel.derive import derive
from port_kit.errors import ParallelError
from port_kit.pipeline.caching import BranchCacheContexts


def separate_branches(pipeline: Any, denoisers: Mapping[str, nn.Module]) -> None:
    """Give each guidance branch of a pipeline its own contexts.

    Args:
        pipeline: a diffusers pipeline.
        denoisers: its modules that Cache-DiT is enabled for.

    Raises:
        ParallelError: ``plan_cache``; the pipeline has no scheduler, whose steps tell the branches of one step.
    """
    contexts = [BranchCacheContexts() for _ in denoisers]
    for denoiser, each in zip(denoisers.values(), contexts, strict=True):
        denoiser.register_forward_pre_hook(each)
    found = [each for each in pipeline.components.values() if hasattr(each, "set_timesteps") and hasattr(each, "step")]
    if not found:
        raise ParallelError(
            f"{type(pipeline).__name__} has no scheduler, whose steps separate the calls of guidance branches",
            code="plan_cache",
            hint="remove cache_backend",
        )
    for scheduler in found:
        derive(scheduler, {"step": _step(type(scheduler).step, contexts)})


def _step(original: Callable[..., Any], contexts: Sequence[BranchCacheContexts]) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        for each in contexts:
            each.end_step()
        return original(self, *args, **kwargs)

    return step
