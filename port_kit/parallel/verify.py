"""``port-kit verify parallel``: N ranks against one, with proof that the work was divided.

A *subject* is a model directory and requests. Every layout runs in forked workers (:mod:`port_kit.testing.workers`)
beside a run on one rank; outputs must agree, and what each rank did must show that it did its share
(:mod:`port_kit.parallel.trace`, :mod:`port_kit.parallel.findings`). If outputs differ, both runs are repeated with
all modules' outputs kept, and the first module that differs is named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from port_kit.errors import ParallelError
from port_kit.parallel import trace
from port_kit.parallel.findings import Finding, compare, first_divergence
from port_kit.parallel.layout import Layout
from port_kit.testing.workers import RankResult, Request, run_workers

#: Layouts of 2 to 4 ranks that a port with attention, guidance and blocks should support.
MATRIX = (
    *("tp2", "ulysses2", "ring2", "ring3", "allgather2", "cfg2", "hsdp2"),
    *("ulysses2xring2", "tp2xulysses2", "ulysses2xcfg2", "hsdp2xulysses2", "hsdp2xcfg2"),
)
#: Largest absolute difference of an output from one rank's, float32.
TOLERANCE = 5e-6


@dataclass(frozen=True)
class Subject:
    """What is run.

    Attributes:
        model: a model directory.
        requests: run in order, each on every rank.
        config: fields of ``OmniDiffusionConfig``; ``parallel_config`` is the layout's.
        setup: called in every rank before its worker is built, with the number of ranks.
    """

    model: Path
    requests: Sequence[Request]
    config: Mapping[str, Any] = field(default_factory=dict)
    setup: Callable[[int], None] | None = None

    def run(self, layout: Layout, *, keep_outputs: bool = False) -> list[RankResult]:
        """Run on the layout's ranks; each result's ``probe`` is the rank's :class:`~port_kit.parallel.trace.Trace`."""

        def prepare() -> None:
            trace.install(keep_outputs=keep_outputs)
            if self.setup:
                self.setup(layout.world)

        config = {**self.config, "parallel_config": layout.parallel_config}
        return run_workers(self.model, self.requests, config=config, setup=prepare, probe=trace.collect)


@dataclass(frozen=True)
class LayoutReport:
    """One layout beside one rank.

    Attributes:
        layout: as :meth:`Layout.parse` reads it.
        world: ranks.
        max_abs: largest difference of any output of any rank; None where the run failed.
        tokens: tokens of the widest attention query, on one rank and on each rank.
        parameter_bytes: of the transformers, on one rank and on each rank.
        collectives: of rank 0, ``{operator: (calls, bytes)}``.
        findings: what is wrong; empty when the layout holds.
        seconds: for the layout's run.
    """

    layout: str
    world: int
    max_abs: float | None
    tokens: tuple[int, ...]
    parameter_bytes: tuple[int, ...]
    collectives: Mapping[str, tuple[int, int]]
    findings: Sequence[Finding]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the ranks computed what one computes, and divided the work."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-serialisable values."""
        findings = [{"fault": f.fault, "where": f.where, "message": f.message, "hint": f.hint} for f in self.findings]
        return {
            "layout": self.layout,
            "world": self.world,
            "ok": self.ok,
            "max_abs": self.max_abs,
            "tokens": list(self.tokens),
            "parameter_bytes": list(self.parameter_bytes),
            "collectives": {op: {"calls": calls, "bytes": size} for op, (calls, size) in self.collectives.items()},
            "findings": findings,
            "seconds": round(self.seconds, 2),
        }


def verify_parallel(
    subject: Subject, layouts: Iterable[str] = MATRIX, *, tolerance: float = TOLERANCE
) -> Iterator[LayoutReport]:
    """Run one rank, then every layout, and report on each.

    Raises:
        ParallelError: a layout is impossible in itself, or the run on one rank fails.
    """
    parsed = [Layout.parse(text) for text in layouts]
    single = subject.run(Layout())[0]
    for layout in parsed:
        yield verify_layout(subject, layout, single, tolerance=tolerance)


def verify_layout(
    subject: Subject, layout: Layout, single: RankResult, *, tolerance: float = TOLERANCE
) -> LayoutReport:
    """Run one layout and compare it with ``single``, the result of ``subject.run(Layout())``."""
    started = time.monotonic()
    try:
        ranks = subject.run(layout)
    except ParallelError as error:
        finding = _failure(error)
        return LayoutReport(str(layout), layout.world, None, (), (), {}, (finding,), time.monotonic() - started)
    traces = [rank.probe for rank in ranks]
    findings = compare(layout, single.probe, traces)
    max_abs = max(difference(rank.outputs, single.outputs) for rank in ranks)
    if not max_abs <= tolerance:
        findings.append(_diagnose(subject, layout, max_abs, tolerance))
    return LayoutReport(
        layout=str(layout),
        world=layout.world,
        max_abs=max_abs,
        tokens=tuple(_tokens(one) for one in (single.probe, *traces)),
        parameter_bytes=tuple(one.parameter_bytes for one in (single.probe, *traces)),
        collectives=traces[0].collectives,
        findings=findings,
        seconds=time.monotonic() - started,
    )


def _diagnose(subject: Subject, layout: Layout, max_abs: float, tolerance: float) -> Finding:
    """Run both again with the modules' outputs kept, and name the first module that differs on any rank."""
    message = f"outputs differ from one rank's by up to {max_abs:.2e}; {tolerance:.0e} is allowed"
    if layout.cfg > 1:
        return Finding("outputs_differ", "guidance", message)
    alone = subject.run(Layout(), keep_outputs=True)[0].probe
    for rank in subject.run(layout, keep_outputs=True):
        path = first_divergence(alone, rank.probe, 10 * tolerance)
        if path:
            return Finding("outputs_differ", path, f"{message}; {path} is the first to differ, on rank {rank.rank}")
    return Finding("outputs_differ", "pipeline", f"{message}; no module of the transformer differs")


def _failure(error: ParallelError) -> Finding:
    """Tell an HSDP condition that matches nothing, which vLLM-Omni refuses, from other failures."""
    if "No modules were sharded" in error.message or "_hsdp_shard_conditions" in error.message:
        return Finding("weights_not_sharded", "transformer", "no module matches _hsdp_shard_conditions")
    return Finding("failed", f"rank {error.details.get('rank', '?')}", error.message.partition("\n")[0])


def _tokens(one: trace.Trace) -> int:
    return max((call.query for calls in one.attention.values() for call in calls), default=0)


def difference(actual: Any, expected: Any) -> float:
    """Return the largest absolute difference of two nested outputs; infinite where their shapes differ."""
    if isinstance(expected, Tensor):
        if not isinstance(actual, Tensor) or actual.shape != expected.shape:
            return float("inf")
        delta = (actual.double() - expected.double()).abs()
        return torch.nan_to_num(delta, nan=float("inf")).max().item() if delta.numel() else 0.0
    if isinstance(expected, Mapping):
        return max((difference(actual[key], value) for key, value in expected.items()), default=0.0)
    if isinstance(expected, (list, tuple)):
        return max((difference(a, b) for a, b in zip(actual, expected, strict=True)), default=0.0)
    return 0.0
