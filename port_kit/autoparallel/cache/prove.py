"""Proof of Cache-DiT for a plan: several steps with the cache, against the same steps without it.

Three requests run at each configuration. With a threshold of 0 nothing is reused: the outputs must be those of the same
module without the cache. With a huge threshold everything is reused: with inputs that change from step to step the
outputs must change, and with equal inputs they must not, since the residual is the same. Cache-DiT's own counters tell
the steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from port_kit.autoparallel.cache.steps import (
    EVERYTHING,
    NOTHING,
    ROUNDING,
    STEPS,
    Outputs,
    Steps,
    cache_enabled,
    caller,
    run_cached_steps,
    run_steps,
)
from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.prove_rank import INPUTS, Run, apply_plan, run_inputs
from port_kit.autoparallel.results import (
    CONTROL_FACTOR,
    TOLERANCE,
    LayoutResult,
    difference,
    orderly,
    refusals,
    short_reason,
)
from port_kit.autoparallel.subject import OTHER_SCALES, ModelScale, Subject
from port_kit.errors import PortKitError
from port_kit.parallel.cached_layout import with_cache
from port_kit.parallel.layout import Layout

#: Largest difference of a module with the cache that reuses nothing from the same module without it.
EXACT = 1e-6
#: A threshold with which some steps are reused: ranks must decide alike.
SOME = 0.4


@dataclass
class CacheRun:
    """Results of one configuration on one rank.

    Attributes:
        uncached: outputs of each step without the cache, per input.
        nothing: requests that reuse nothing, per input.
        repeated: requests that reuse everything, with equal inputs at all steps, per input.
        everything: the same with inputs that change, for the first input.
        some: the same with a threshold between.
        exchanges: attention calls by kind of exchange.
    """

    uncached: list[list[Outputs]] = field(default_factory=list)
    nothing: list[Steps] = field(default_factory=list)
    repeated: list[Steps] = field(default_factory=list)
    everything: Steps = field(default_factory=Steps)
    some: Steps = field(default_factory=Steps)
    exchanges: dict[str, int] = field(default_factory=dict)


def prove_cache(
    subject: Subject,
    plan: Plan,
    layout: Layout,
    scales: Mapping[str, ModelScale] = OTHER_SCALES,
    timeout: float = 240.0,
) -> LayoutResult:
    """Prove Cache-DiT with a layout. An error of a rank is a reason, not an exception."""
    torch.set_num_threads(1)  # ranks have one: other numbers round differently
    result = LayoutResult(with_cache(layout))
    if refused := _refusals(plan, layout):
        result.reason = f"refused: {'; '.join(refused)}"
        return result
    runs = [Run("inferred", ModelScale()), *(Run(name, scale) for name, scale in scales.items())]
    try:
        ranks = _run_ranks(subject, plan, runs, layout, timeout)
    except PortKitError as error:
        result.reason = short_reason(error)
        return result
    expected = [[_uncached(subject, run, subject.build(run.model), at) for at in range(len(INPUTS))] for run in runs]
    _compare(result, layout, runs, ranks, expected)
    return result


def _refusals(plan: Plan, layout: Layout) -> list[str]:
    found = refusals(plan, layout)
    if not any(blocks.cache_pattern for blocks in plan.blocks):
        found += [f"{blocks.modules}: {blocks.cache_reason}" for blocks in plan.blocks] or [
            "the plan has no list of blocks"
        ]
    return found


def _run_ranks(
    subject: Subject, plan: Plan, runs: Sequence[Run], layout: Layout, timeout: float
) -> list[list[CacheRun]]:
    from port_kit.testing.workers import run_ranks, warm_up

    warm_up()
    with tempfile.TemporaryDirectory(prefix="port-kit-cache-") as folder:

        def work(rank: int) -> list[CacheRun]:
            return _rank(subject, plan, runs, layout, rank, Path(folder))

        return run_ranks(layout.world, work, timeout=timeout)


def _rank(subject: Subject, plan: Plan, runs: Sequence[Run], layout: Layout, rank: int, folder: Path) -> list[CacheRun]:
    from port_kit.autoparallel.engine_groups import engine_groups

    torch.set_num_threads(1)
    with engine_groups(layout, rank, folder / "rendezvous", torch.float32) as config:
        return [_run(subject, plan, run, layout, config) for run in runs]


def _run(subject: Subject, plan: Plan, run: Run, layout: Layout, config: Any) -> CacheRun:
    model = subject.build(run.model)
    sharded = apply_plan(model, plan, layout, config, run.dtype)
    request = partial(_request, subject, plan, run, model, sharded.boundaries)
    every = range(len(INPUTS))
    uncached = [_uncached(subject, run, model, at) for at in every]
    found = CacheRun(uncached, request(NOTHING, every), request(EVERYTHING, every, varied=False))
    (found.everything,), (found.some,) = request(EVERYTHING, [0]), request(SOME, [0])
    found.exchanges = sharded.exchanges()
    return found


def _request(
    subject: Subject,
    plan: Plan,
    run: Run,
    model: nn.Module,
    boundaries: Any,
    threshold: float,
    inputs: Sequence[int],
    *,
    varied: bool = True,
) -> list[Steps]:
    with cache_enabled(model, plan, threshold, boundaries) as backend:
        return [
            run_cached_steps(
                model, caller(subject, model), partial(run_inputs, subject, run, INPUTS[at]), backend, varied=varied
            )
            for at in inputs
        ]


def _uncached(subject: Subject, run: Run, model: nn.Module, at: int) -> list[Outputs]:
    """Return the outputs of each step without the cache."""
    return run_steps(caller(subject, model), partial(run_inputs, subject, run, INPUTS[at]))


def _compare(
    result: LayoutResult,
    layout: Layout,
    runs: Sequence[Run],
    ranks: Sequence[Sequence[CacheRun]],
    expected: Sequence[Sequence[list[Outputs]]],
) -> None:
    changed, reconstruction = [], []
    for number, run in enumerate(runs):
        for rank in ranks:
            own = rank[number]
            for at, wanted in enumerate(expected[number]):
                worst = _worst(own.nothing[at].outputs, wanted)
                result.scales[run.scale] = max(worst, result.scales.get(run.scale, 0.0))
                changed.append(_worst(own.nothing[at].outputs, own.uncached[at]))
                reconstruction.append(_worst(own.repeated[at].outputs, [own.uncached[at][0]] * STEPS))
    first = [rank[0] for rank in ranks]
    result.difference, result.reconstruction = max(result.scales.values()), max(reconstruction)
    result.control = min(_worst(rank.everything.outputs, expected[0][0]) for rank in first)
    steps = first[0].everything
    result.exchanges, result.reused = first[0].exchanges, first[0].some.reused
    result.skipped = steps.skipped / (steps.skipped + steps.computed)
    result.reason = "; ".join([*_faults(result, layout, max(changed)), *_miscounted(ranks)])
    result.proven = not result.reason


def _worst(found: Sequence[Outputs], wanted: Sequence[Outputs]) -> float:
    return max(difference(one, other) for one, other in zip(found, wanted, strict=True))


def _faults(result: LayoutResult, layout: Layout, changed: float) -> Iterator[str]:
    if not changed <= EXACT:
        yield f"with a threshold of 0, differs from the same module without the cache by {changed:.1e}"
    if not (result.difference is not None and result.difference <= TOLERANCE):
        worst = max(result.scales, key=lambda scale: orderly(result.scales[scale]))
        yield f"differs from the unmodified module by {result.difference:.1e} ({worst})"
    if not (result.reconstruction is not None and result.reconstruction <= ROUNDING):
        yield f"with equal inputs, a cached step differs by {result.reconstruction:.1e}"
    if not (result.control is not None and result.control >= CONTROL_FACTOR * TOLERANCE):
        yield "the result is the same if everything is reused"
    if layout.sequence > 1 and not set(result.exchanges) - {"local"}:
        yield "no attention call exchanges tokens"
    if not result.skipped:
        yield "no call of a block is left out"


def _miscounted(ranks: Sequence[Sequence[CacheRun]]) -> Iterator[str]:
    """Yield the counts that are not those of the requests."""
    runs = [run for rank in ranks for run in rank]
    executed = {count for run in runs for steps in (*run.nothing, *run.repeated) for count in steps.executed.values()}
    if executed != {STEPS}:
        yield f"Cache-DiT counted {sorted(executed)} steps of {STEPS}"
    if any(count for run in runs for steps in run.nothing for count in steps.reused.values()):
        yield "with a threshold of 0, steps were reused"
    reused = {count for run in runs for steps in (*run.repeated, run.everything) for count in steps.reused.values()}
    if reused != {STEPS - 1}:
        yield f"without a threshold, {sorted(reused)} of {STEPS} steps were reused"
    if any(len({str(run.some.reused) for run in same}) > 1 for same in zip(*ranks, strict=True)):
        yield "ranks decided differently"
