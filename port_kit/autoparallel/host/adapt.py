"""Application of a plan to a denoiser in a worker, after its construction and before its weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from port_kit.autoparallel.block_lists import declare_hsdp
from port_kit.autoparallel.boundaries import ShardedModel
from port_kit.autoparallel.cache.adapter import declare_cache
from port_kit.autoparallel.host.checks import has_cache
from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.replace import replace_modules
from port_kit.autoparallel.sequence import apply_tokens
from port_kit.autoparallel.tensor.apply import apply_tensor_parallelism
from port_kit.autoparallel.tensor.weights import weight_rules
from port_kit.remap import Rule, RuleSet

#: Rules of an unmodified denoiser: checkpoints of diffusers have the names of the module.
SAME_NAMES = RuleSet(name="diffusers", rules=(Rule("(.+)", target=r"\1"),))


@dataclass(frozen=True)
class Adapted:
    """Changes that a plan made in a denoiser.

    Attributes:
        rules: load its weights.
        sharded: its token boundaries and attention calls; None without a plan.
    """

    rules: RuleSet = SAME_NAMES
    sharded: ShardedModel | None = None


def adapt(
    module: nn.Module, plan: Plan | None, od_config: Any, prefix: str, replace: Mapping[str, str] | None = None
) -> Adapted:
    """Apply a plan in place, for the engine's layout, and put hand-written modules in place of adapted ones.

    Args:
        module: the denoiser; its parameters are on the meta device.
        plan: proves the layout (:func:`port_kit.autoparallel.host.checks.check_host`); None without a layout that
            needs one.
        od_config: the engine's configuration.
        prefix: name of the component.
        replace: ``{pattern of modules: "module:Class"}``.

    Raises:
        ParallelError: ``plan_degree``, ``plan_pattern``, ``plan_cache``; the module lacks what the plan names, or its
            sizes do not divide. ``plan_replace``; a hand-written module does not fit.
    """
    parallel, rules = od_config.parallel_config, SAME_NAMES
    if plan is not None and parallel.tensor_parallel_size > 1:
        rules = weight_rules(apply_tensor_parallelism(module, plan, prefix=prefix), plan.subject)
    plan = replace_modules(module, replace or {}, plan)
    if plan is None:
        return Adapted()
    sharded = apply_tokens(module, plan)
    if parallel.use_hsdp:
        declare_hsdp(module, plan)
    if has_cache(od_config.cache_backend):
        declare_cache(module, plan, sharded.boundaries)
    return Adapted(rules, sharded)
