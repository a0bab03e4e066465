"""Application of a plan to a denoiser in a worker, after its construction and before its weights are loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from port_kit.autoparallel.plan import Plan, matches
from port_kit.autoparallel.sequence import apply_tokens


def adapt(module: nn.Module, plan: Plan, od_config: Any) -> None:
    """Apply a plan in place, for the engine's layout.

    Args:
        module: the denoiser; its parameters are on the meta device.
        plan: proves the layout (:func:`port_kit.autoparallel.host.checks.check_host`).
        od_config: the engine's configuration.

    Raises:
        ParallelError: the module lacks what the plan names.
    """
    parallel = od_config.parallel_config
    if parallel.sequence_parallel_size > 1:
        apply_tokens(module, plan)
    if parallel.use_hsdp:
        patterns = [blocks.modules for blocks in plan.blocks if blocks.hsdp]
        conditions = [lambda name, _module, pattern=pattern: matches(name, pattern) for pattern in patterns]
        module._hsdp_shard_conditions = conditions  # type: ignore[assignment]
