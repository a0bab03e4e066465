"""Trial of a plan in one process: each rank is a thread with a copy of the module."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from port_kit.autoparallel.boundaries import ShardedModel, shard_tokens
from port_kit.autoparallel.exchange import ThreadExchange, ThreadWorld
from port_kit.autoparallel.observe import block_paths
from port_kit.autoparallel.plan import Plan, TokenAxis, generalize
from port_kit.autoparallel.tree import leaves

#: Largest relative difference of outputs that count as equal.
TOLERANCE = 1e-4


@dataclass
class Trace:
    """One run of one rank.

    Attributes:
        result: what the module returned.
        error: exception that ended the run.
        values: outputs of modules in blocks, by path and number of the call, in order of completion.
        running: modules that were running at an error, innermost last.
        sharded: the module with the plan applied.
    """

    result: Any = None
    error: BaseException | None = None
    values: list[tuple[tuple[str, int], Any]] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    sharded: ShardedModel | None = None


@dataclass
class Trial:
    """Result of a trial.

    Attributes:
        difference: largest difference from one rank, relative to the largest value.
        culprit: path of the first module whose output differs, or that raised an error.
        error: text of the error, or empty.
        exchanges: attention calls of rank 0 by kind of exchange.
    """

    difference: float
    culprit: str
    error: str
    exchanges: dict[str, int]

    @property
    def ok(self) -> bool:
        """True if the ranks computed what one rank computes."""
        return self.difference <= TOLERANCE


def run_once(model: nn.Module, inputs: dict[str, Any]) -> Trace:
    """Run a module on one rank and keep the outputs of modules in blocks."""
    trace = Trace()
    _run(copy.deepcopy(model), inputs, trace)
    if trace.error is not None:
        raise trace.error
    return trace


def run_trial(
    model: nn.Module,
    inputs: dict[str, Any],
    plan: Plan,
    outputs: Mapping[tuple[str, int], tuple[TokenAxis, ...]],
    single: Trace,
    ranks: int = 2,
) -> Trial:
    """Run a module with a plan on several ranks and compare it with one rank.

    Args:
        model: unmodified module.
        inputs: keyword arguments.
        plan: plan with a sequence-parallel part.
        outputs: token axes of the outputs of modules, to find the first one that differs.
        single: run of :func:`run_once` with the same inputs.
        ranks: number of ranks.
    """
    world = ThreadWorld(ranks)
    traces = [Trace() for _ in range(ranks)]
    threads = [threading.Thread(target=_rank, args=(model, inputs, plan, world, r, traces[r])) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [t for t in traces if t.error is not None and not isinstance(t.error, threading.BrokenBarrierError)]
    exchanges = traces[0].sharded.exchanges() if traces[0].sharded else {}
    if errors or any(trace.error for trace in traces):
        failed = (errors or traces)[0]
        text = f"{type(failed.error).__name__}: {failed.error}"
        return Trial(math.inf, failed.running[-1] if failed.running else "", text, exchanges)
    worst = max(difference(trace.result, single.result) for trace in traces)
    inside = [site.module for site in plan.attention if site.at == "linears"]
    culprit = first_difference(traces, single, outputs, inside) if worst > TOLERANCE else ""
    return Trial(worst, culprit, "", exchanges)


def _rank(model: nn.Module, inputs: dict[str, Any], plan: Plan, world: ThreadWorld, rank: int, trace: Trace) -> None:
    try:
        own = copy.deepcopy(model)
        trace.sharded = shard_tokens(own, plan, ThreadExchange(world, rank))
        _run(own, copy.deepcopy(inputs), trace)
    except Exception as error:  # reported by the thread that started this one
        trace.error = error
    if trace.error is not None:
        world.barrier.abort()


def _run(model: nn.Module, inputs: dict[str, Any], trace: Trace) -> None:
    counts: dict[str, int] = {}
    depth = [0]
    blocks = set(block_paths(model))

    def enter(path: str) -> Any:
        def hook(*_: Any) -> None:
            trace.running.append(path)
            depth[0] += path in blocks

        return hook

    def leave(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            trace.running.pop()
            if depth[0]:
                nth = counts.get(path, 0)
                counts[path] = nth + 1
                trace.values.append(((path, nth), output))
            depth[0] -= path in blocks

        return hook

    for path, module in model.named_modules():
        module.register_forward_pre_hook(enter(path), prepend=True)
        module.register_forward_hook(leave(path))
    try:
        with torch.no_grad():
            trace.result = model(**inputs)
    except Exception as error:  # reported by the caller
        trace.error = error


def first_difference(
    traces: list[Trace],
    single: Trace,
    outputs: Mapping[tuple[str, int], tuple[TokenAxis, ...]],
    inside: Sequence[str] = (),
) -> str:
    """Return the path of the first module whose output is not the ranks' part of what one rank computes.

    Modules inside of those that match the patterns ``inside`` hold other channels, and are left out.
    """
    expected = dict(single.values)
    others = [dict(trace.values) for trace in traces]
    for key, _ in traces[0].values:
        if any(generalize(key[0]).startswith(f"{pattern}.") for pattern in inside):
            continue
        if key not in expected or any(key not in other for other in others):
            return key[0]
        if not _agree([other[key] for other in others], expected[key], outputs.get(key, ()), traces):
            return key[0]
    return ""


def _agree(parts: list[Any], whole: Any, axes: tuple[TokenAxis, ...], traces: list[Trace]) -> bool:
    table = {axis.path: axis for axis in axes}
    assert traces[0].sharded is not None
    tokens = traces[0].sharded.tokens
    by_path = [dict(leaves(part)) for part in parts]
    for path, value in leaves(whole):
        own: list[Any] = [one.get(path) for one in by_path]
        if not isinstance(value, Tensor):
            continue
        axis = table.get(path)
        if axis is not None and own[0].shape != value.shape:
            if any(stream not in (tokens.rows if axis.grid > 1 else tokens.lengths) for stream in axis.streams):
                return False
            if own[0].shape[axis.dim] != tokens.local_total(axis.streams, axis.grid):
                return False
            own = [tokens.join(own, axis.dim, axis.streams, axis.grid)]
        if any(difference(one, value) > 10 * TOLERANCE for one in own):
            return False
    return True


def difference(actual: Any, expected: Any) -> float:
    """Return the largest difference of nested outputs, relative to the largest expected value of each tensor."""
    worst = 0.0
    for (_, one), (_, other) in zip(leaves(actual), leaves(expected), strict=True):
        if not isinstance(other, Tensor) or not (other.is_floating_point() or other.is_complex()):
            continue
        if one.shape != other.shape:
            return math.inf
        if other.numel():
            scale = other.abs().max().clamp(min=1e-12)
            value = ((one - other).abs().max() / scale).item()
            worst = max(worst, math.inf if math.isnan(value) else value)
    return worst
