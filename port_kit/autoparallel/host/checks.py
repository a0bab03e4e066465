"""Checks of a hosted pipeline's engine options, before workers start."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from port_kit.autoparallel.host.index import PipelineIndex
from port_kit.autoparallel.plan import Plan
from port_kit.errors import InputError, ParallelError
from port_kit.parallel.engine_checks import layout_of
from port_kit.parallel.layout import Layout
from port_kit.runtime.engine_options import check_options

logger = logging.getLogger(__name__)

#: Options of the engine that no plan proves.
_UNSUPPORTED = (
    "cache_backend",
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
    kinds = {kind for kind in layout.degrees if kind != "cfg"}
    if not kinds:
        return
    if plan is None:
        raise ParallelError(
            f"{layout}: no plan proves {' and '.join(sorted(kinds))} for {index.components[index.denoisers[0]]}",
            code="plan_layout",
            hint="infer a plan with port-kit plan infer, or use cfg_parallel_size only",
        )
    check_class(index, plan)
    check_layout(layout, plan)


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


def check_layout(layout: Layout, plan: Plan) -> None:
    """Check that a plan proves the combination of kinds of a layout, guidance apart.

    Raises:
        ParallelError: ``plan_layout``.
    """
    kinds = _kinds(layout)
    proven = {frozenset(_kinds(Layout.parse(proof.layout))) for proof in plan.proofs}
    if frozenset(kinds) in proven:
        return
    reasons = "; ".join(f"{refusal.kind}: {refusal.reason}" for refusal in plan.refused if refusal.kind in kinds)
    raise ParallelError(
        f"{layout}: the plan of {plan.subject} does not prove this layout" + (f" ({reasons})" if reasons else ""),
        code="plan_layout",
        hint="proven: " + (", ".join(sorted({proof.layout for proof in plan.proofs})) or "none"),
    )


def _kinds(layout: Layout) -> set[str]:
    return {kind for kind in layout.degrees if kind != "cfg"}


def _unsupported(option: str) -> InputError:
    return InputError(
        f"Option {option} is not supported for a hosted diffusers pipeline.",
        code="engine_option",
        hint=f"remove {option}",
        option=option,
    )
