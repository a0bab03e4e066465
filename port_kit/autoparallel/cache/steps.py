"""Several steps of a module with and without Cache-DiT, enabled as vLLM-Omni enables it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from port_kit.autoparallel.boundaries import Boundary
from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.results import difference
from port_kit.autoparallel.subject import ModelScale, Subject, TokenScale
from port_kit.autoparallel.tree import rebuild
from port_kit.errors import PortKitError
from port_kit.upstream.checks import require

#: Steps of one request.
STEPS = 3
#: Thresholds with which nothing and everything is reused.
NOTHING, EVERYTHING = 0.0, 2.0
#: Largest difference of a reconstruction relative to the largest value: it adds a residual to the first blocks' result.
ROUNDING = 1e-4

Outputs = tuple[Tensor, ...]


@dataclass
class Steps:
    """Results of one request.

    Attributes:
        outputs: output tensors per step.
        executed: steps that Cache-DiT counted, by list.
        reused: those of them that reused, by list.
        computed: calls of blocks.
        skipped: calls of blocks that were left out.
    """

    outputs: list[Outputs] = field(default_factory=list)
    executed: dict[str, int] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    computed: int = 0
    skipped: int = 0


def run_steps(
    call: Callable[[dict[str, Any]], Outputs], inputs: Callable[[], dict[str, Any]], *, varied: bool = True
) -> list[Outputs]:
    """Return the outputs of each step.

    Args:
        call: the module.
        inputs: returns new inputs.
        varied: values differ from step to step.
    """
    return [call(_changed(inputs(), 0.5 * step if varied else 0.0)) for step in range(STEPS)]


def run_cached_steps(
    model: nn.Module,
    call: Callable[[dict[str, Any]], Outputs],
    inputs: Callable[[], dict[str, Any]],
    backend: Any,
    *,
    varied: bool = True,
) -> Steps:
    """Run one request with the cache; see :func:`run_steps`."""
    from port_kit.autoparallel.cache.adapter import cached_lists

    backend.refresh(SimpleNamespace(transformer=model), STEPS, verbose=False)
    regions = cached_lists(model).regions
    for region in regions.values():
        region.computed = region.skipped = 0
    steps = Steps(run_steps(call, inputs, varied=varied))
    for name, region in regions.items():
        context = region.manager.get_context(region.context)
        steps.executed[name] = context.get_accumulated_executed_steps()
        steps.reused[name] = context.get_accumulated_cached_steps()
        steps.computed += region.computed
        steps.skipped += region.skipped
    return steps


@contextmanager
def cache_enabled(
    model: nn.Module, plan: Plan, threshold: float, boundaries: Mapping[nn.Module, Boundary] | None = None
) -> Iterator[Any]:
    """Enable vLLM-Omni's Cache-DiT backend for a module, without warm-up; disable it at the end.

    Raises:
        ParallelError: ``plan_cache``, ``plan_pattern``.
    """
    from vllm_omni.diffusion.cache.cachedit import CacheDiTBackend
    from vllm_omni.diffusion.data import DiffusionCacheConfig

    from port_kit.autoparallel.cache.adapter import declare_cache

    require("cache_backend")
    declare_cache(model, plan, boundaries)
    config = DiffusionCacheConfig(
        residual_diff_threshold=threshold, max_warmup_steps=0, max_continuous_cached_steps=-1, Fn_compute_blocks=1
    )
    backend = CacheDiTBackend(config)
    pipeline = SimpleNamespace(transformer=model)
    with _quiet():
        backend.enable(pipeline)
        try:
            yield backend
        finally:
            backend.disable(pipeline)


@contextmanager
def _quiet() -> Iterator[None]:
    """Log only errors of Cache-DiT, which reports every module that it is enabled for."""
    names = [
        name for name in logging.root.manager.loggerDict if name.startswith(("cache_dit", "CACHE_DIT", "vllm_omni"))
    ]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def check_reuse(subject: Subject, plan: Plan, scale: ModelScale, tokens: TokenScale) -> str:
    """Return the finding if a cached step differs from a computed one with equal inputs, else an empty text."""
    model = subject.build(scale)
    call, inputs = caller(subject, model), lambda: subject.inputs(tokens, scale)
    expected = call(inputs())
    try:
        with cache_enabled(model, plan, EVERYTHING) as backend:
            steps = run_cached_steps(model, call, inputs, backend, varied=False)
    except (PortKitError, RuntimeError) as error:  # torch's are about shapes
        return f"a cached step fails: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"
    worst = max(difference(outputs, expected) for outputs in steps.outputs)
    if not worst <= ROUNDING:
        return f"with equal inputs, a cached step differs by {worst:.1e}: blocks change more than their states"
    return "" if steps.skipped else "no call of a block is left out"


def caller(subject: Subject, model: nn.Module) -> Callable[[dict[str, Any]], Outputs]:
    """Return a function that calls a module without gradients and returns copies of its outputs."""

    def call(inputs: dict[str, Any]) -> Outputs:
        with torch.no_grad():
            return tuple(output.detach().float().clone() for output in subject.output(model(**inputs)))

    return call


def _changed(inputs: dict[str, Any], amount: float) -> dict[str, Any]:
    """Return the inputs with tensors of tokens changed, unevenly: norms at the entrance would undo a common factor."""

    def change(_path: str, leaf: Any) -> Any:
        if not (torch.is_tensor(leaf) and leaf.is_floating_point() and leaf.dim() > 2):
            return leaf
        return leaf * (1 + amount * torch.linspace(1, 0, leaf.shape[-1], dtype=leaf.dtype))

    return rebuild(inputs, change) if amount else inputs
