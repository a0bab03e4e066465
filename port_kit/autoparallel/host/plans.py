"""The plan of a hosted pipeline: given, shipped, or inferred on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from port_kit.autoparallel.host.checks import PLAN_KEY, check_class, check_layout
from port_kit.autoparallel.host.index import PipelineIndex
from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.shipped import check_fresh, local_plan, shipped_plan
from port_kit.errors import ParallelError
from port_kit.parallel.cached_layout import with_cache
from port_kit.parallel.layout import Layout

__all__ = ["PLAN_KEY", "find_plan"]


def find_plan(
    index: PipelineIndex,
    layout: Layout,
    given: Path | None,
    *,
    report: Callable[[str], None],
    cached: bool = False,
) -> Path:
    """Return the path of a plan that proves a layout for the denoisers of a pipeline.

    A shipped plan that is stale, or that does not prove the layout, is reported, and a plan is inferred.

    Args:
        index: the pipeline.
        layout: layout of the engine.
        given: plan file of the user; no other one is tried.
        report: receives a line per step.
        cached: the plan must prove the layout with Cache-DiT.

    Raises:
        ParallelError: ``plan_layout``, ``plan_file``, ``plan_stale``, ``plan_subject``.
    """
    if given is not None:
        plan = Plan.load(given)
        check_fresh(plan, str(given))
        check_class(index, plan)
        check_layout(layout, plan, cached=cached)
        return given
    class_name = index.components[index.denoisers[0]]
    try:
        shipped = shipped_plan(class_name)
        if shipped is not None:
            check_layout(layout, Plan.load(shipped), cached=cached)
            return shipped
    except ParallelError as error:
        report(f"the shipped plan is not used: {error.message}")
    kinds = replace(layout, cfg=1)
    path = local_plan(class_name, with_cache(kinds) if cached else str(kinds), report=report)
    check_class(index, Plan.load(path))
    check_layout(layout, Plan.load(path), cached=cached)
    return path
