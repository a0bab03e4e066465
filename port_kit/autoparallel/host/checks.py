"""Checks of a hosted pipeline's engine options, before workers start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from port_kit.autoparallel.cache.layouts import CACHE, split_cache, with_cache
from port_kit.autoparallel.host.index import PipelineIndex
from port_kit.autoparallel.plan import Plan
from port_kit.errors import InputError, ParallelError
from port_kit.parallel.engine_checks import layout_of
from port_kit.parallel.layout import Layout
from port_kit.runtime.engine_options import check_options

logger = logging.getLogger(__name__)

#: Options of the engine that no plan proves.
_UNSUPPORTED = (
    "enable_cpu_offload",
    "enable_layerwise_offload",
    "enable_distributed_layerwise_offload",
    "lora_path",
    "quantization_config",
    "step_execution",
)
#: Key of ``additional_config`` with the path of the plan file.
PLAN_KEY = "port_kit_plan"


def plan_of(od_config: Any) -> Plan | None:
    """Return the plan that an engine's ``additional_config`` names, or None.

    Raises:
        ParallelError: ``plan_file``.
    """
    path = (od_config.additional_config or {}).get(PLAN_KEY)
    return None if path is None else Plan.load(Path(path))


def check_host(od_config: Any) -> None:
    """Check that the plan proves the engine's layout, and that all options are supported.

    Guidance parallelism needs no plan: the first step of a request shows what it can be spread over.

    Raises:
        ParallelError: ``plan_layout``, ``plan_file``.
        InputError: ``engine_option``.
    """
    check_options(od_config)
    index, plan = PipelineIndex.read(od_config.model), plan_of(od_config)
    layout = layout_of(od_config.parallel_config)
    for option in _UNSUPPORTED:
        if getattr(od_config, option) not in (None, False, "none"):
            raise _unsupported(option)
    cached = has_cache(od_config.cache_backend)
    if cached and layout.cfg > 1:
        raise _unsupported(
            "cfg_parallel_size", "; its ranks run unequal numbers of calls, and cache_dit decides on all"
        )
    kinds = kinds_of(layout, cached)
    if not kinds:
        return
    if plan is None:
        raise ParallelError(
            f"{layout}: no plan proves {' and '.join(sorted(kinds))} for {index.components[index.denoisers[0]]}",
            code="plan_layout",
            hint="infer a plan with port-kit plan infer, or use cfg_parallel_size only",
        )
    check_class(index, plan)
    check_layout(layout, plan, cached=cached)


def has_cache(backend: str | None) -> bool:
    """Return True for Cache-DiT.

    Raises:
        InputError: ``engine_option``; it is another cache, which no plan proves.
    """
    if backend not in (None, "none", CACHE):
        raise _unsupported("cache_backend", f": expected {CACHE}, got {backend}")
    return backend == CACHE


def check_class(index: PipelineIndex, plan: Plan) -> None:
    """Check that a plan was inferred for the class of the denoisers.

    Raises:
        ParallelError: ``plan_layout``.
    """
    for name in index.denoisers:
        if plan.module_class.rpartition(".")[2] != index.components[name]:
            raise ParallelError(
                f"the plan is for {plan.module_class}; {name} is {index.components[name]}",
                code="plan_layout",
                hint=f"port-kit plan infer {index.components[name]} -o plan.toml",
            )


def check_layout(layout: Layout, plan: Plan, *, cached: bool = False) -> None:
    """Check that a plan proves the combination of kinds of a layout, guidance apart.

    Args:
        layout: degrees of parallelism.
        plan: the plan.
        cached: Cache-DiT is one of the kinds.

    Raises:
        ParallelError: ``plan_layout``.
    """
    kinds = kinds_of(layout, cached)
    proven = {frozenset(kinds_of(one, with_it)) for with_it, one in map(split_cache, proofs_of(plan))}
    if frozenset(kinds) in proven:
        return
    reasons = [f"{refusal.kind}: {refusal.reason}" for refusal in plan.refused if refusal.kind in kinds]
    if cached:
        reasons += [f"{blocks.modules}: {blocks.cache_reason}" for blocks in plan.blocks if blocks.cache_reason]
    name = with_cache(layout) if cached else str(layout)
    raise ParallelError(
        f"{name}: the plan of {plan.subject} does not prove this layout"
        + (f" ({'; '.join(reasons)})" if reasons else ""),
        code="plan_layout",
        hint="proven: " + (", ".join(sorted(proofs_of(plan))) or "none"),
    )


def proofs_of(plan: Plan) -> set[str]:
    """Return the layouts that a plan proves."""
    return {proof.layout for proof in plan.proofs}


def kinds_of(layout: Layout, cached: bool) -> set[str]:
    """Return the kinds that a plan must prove: guidance needs no plan."""
    return {kind for kind in layout.degrees if kind != "cfg"} | ({CACHE} if cached else set())


def _unsupported(option: str, reason: str = "") -> InputError:
    return InputError(
        f"Option {option} is not supported for a hosted diffusers pipeline{reason}.",
        code="engine_option",
        hint=f"remove {option}",
        option=option,
    )
