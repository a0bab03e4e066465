"""Checks of a hosted pipeline's engine options, before workers start."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from port_kit.autoparallel.host.index import PipelineIndex
from port_kit.autoparallel.host.media import WORK
from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.ports import plan_file, planned_port
from port_kit.autoparallel.shipped import check_fresh
from port_kit.errors import InputError, ParallelError
from port_kit.parallel.cached_layout import CACHE, split_cache, with_cache
from port_kit.parallel.engine_checks import layout_of
from port_kit.parallel.layout import UAA, Layout
from port_kit.runtime.engine_options import check_options

logger = logging.getLogger(__name__)

#: Options of the engine that no plan proves.
UNPROVEN = (
    "diffusion_kv_cache_dtype",
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
    """Return the plan that an engine's ``additional_config`` names, else that of the port, or None.

    Raises:
        ParallelError: ``plan_file``.
    """
    path, port = (od_config.additional_config or {}).get(PLAN_KEY), planned_port(od_config.model_class_name)
    if path is not None:
        return Plan.load(Path(path))
    return None if port is None else Plan.load(plan_file(port))


def check_host(od_config: Any) -> None:
    """Check that the plan proves the engine's layout, and that all options are supported.

    Guidance parallelism needs no plan: the first step of a request shows what it can be spread over.

    Raises:
        ParallelError: ``plan_layout``, ``plan_file``, ``plan_stale``.
        InputError: ``engine_option``.
    """
    if has_cache(od_config.cache_backend) and od_config.parallel_config.cfg_parallel_size > 1:
        raise _unsupported("cfg_parallel_size", " and cache_dit: ranks run unequal numbers of calls")
    index = PipelineIndex.read(od_config.model)
    plan = check_plan(od_config, index.components[index.denoisers[0]])
    if plan is not None:
        check_class(index, plan)


def check_plan(od_config: Any, subject: str, unproven: Sequence[str] = UNPROVEN) -> Plan | None:
    """Check an engine's options and layout against the plan; return it if the layout needs one.

    Args:
        od_config: the engine's configuration.
        subject: name of the transformer in messages.
        unproven: options that are refused.

    Raises:
        ParallelError: ``plan_layout``, ``plan_file``, ``plan_stale``.
        InputError: ``engine_option``.
    """
    check_options(od_config)
    layout, plan = layout_of(od_config.parallel_config), plan_of(od_config)
    for option in unproven:
        if getattr(od_config, option) not in (None, False, "none", "auto"):
            raise _unsupported(option)
    cached = has_cache(od_config.cache_backend)
    kinds = kinds_of(layout, cached)
    if not kinds:
        return None
    if plan is None:
        raise ParallelError(
            f"{layout}: no plan proves {' and '.join(sorted(kinds))} for {subject}",
            code="plan_layout",
            hint="infer a plan with port-kit plan infer, or use cfg_parallel_size only",
        )
    check_fresh(plan, f"the plan of {plan.subject}")
    check_layout(layout, plan, cached=cached)
    return plan


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


def check_ran(result: Any, layout: Layout) -> dict[str, Any]:
    """Check that the engine ran the layout that was asked for; return the work of rank 0.

    Args:
        result: of ``Omni.generate``.
        layout: what was asked for.

    Raises:
        ParallelError: ``parallel_degree``.
    """
    work: dict[str, Any] = result.multimodal_output["metadata"][WORK]
    if work["layout"] != str(layout):
        raise ParallelError(
            f"the engine ran {work['layout']}, not {layout}",
            code="parallel_degree",
            hint="give Omni the degrees as arguments, such as ulysses_degree=2",
            expected=str(layout),
            found=work["layout"],
        )
    return work


def proofs_of(plan: Plan) -> set[str]:
    """Return the layouts that a plan proves."""
    return {proof.layout for proof in plan.proofs}


def kinds_of(layout: Layout, cached: bool) -> set[str]:
    """Return the kinds that a plan must prove: guidance needs no plan; padded heads are a kind of their own."""
    kinds = {kind for kind in layout.degrees if kind != "cfg"} | ({CACHE} if cached else set())
    return kinds | ({f"ulysses{UAA}"} if layout.uaa else set())


def _unsupported(option: str, reason: str = "") -> InputError:
    return InputError(
        f"Option {option} is not supported for a transformer with a parallel plan{reason}.",
        code="engine_option",
        hint=f"remove {option}",
        option=option,
    )
