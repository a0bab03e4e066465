"""Parallel plans of new ports: shipped, or inferred and proven on tiny modules."""

from __future__ import annotations

from collections.abc import Callable

from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.prove import DEFAULT_LAYOUTS
from port_kit.autoparallel.shipped import proven_plan, shipped_plan
from port_kit.errors import ParallelError, ScaffoldError
from port_kit.parallel.cached_layout import split_cache

#: Layouts of the generated tests, where the plan proves them.
TESTED = ("tp2", "ulysses2")


def plan_of_class(class_name: str, report: Callable[[str], None]) -> Plan:
    """Return the shipped plan of a class of diffusers; infer and prove one if there is none.

    Args:
        class_name: class of the transformer.
        report: receives a line per step.

    Raises:
        ParallelError: ``plan_subject``, ``plan_inference``; no plan can be inferred.
        ScaffoldError: ``scaffold_unsupported``; nothing is proven; lists the findings.
    """
    try:
        path = shipped_plan(class_name)
        if path is not None:
            return Plan.load(path)
    except ParallelError as error:
        report(f"the shipped plan is not used: {error.message}")
    findings: list[str] = []

    def note(line: str) -> None:
        report(line)
        if "not proven" in line:
            findings.append(line.removeprefix(f"{class_name}: "))

    plan = proven_plan(class_name, DEFAULT_LAYOUTS, report=note)
    if not any(set(split_cache(proof.layout)[1].degrees) - {"cfg"} for proof in plan.proofs):
        raise ScaffoldError(
            f"no layout of {class_name} is proven:\n" + "\n".join(f"  - {finding}" for finding in findings),
            code="scaffold_unsupported",
            hint="run it with guidance parallelism only: port-kit run REPO_OR_DIR --cfg-parallel-size 2",
            problems=findings,
        )
    return plan


def tested_layouts(plan: Plan) -> tuple[str, ...]:
    """Return the layouts of :data:`TESTED` that a plan proves."""
    proven = {proof.layout for proof in plan.proofs}
    return tuple(layout for layout in TESTED if layout in proven)
