"""Proof of a plan: several ranks compute what one rank computes, and divide the work.

Each layout runs on forked ranks with vLLM-Omni's process groups, at the configuration that the plan was inferred from
and at others, in float32 and bfloat16, with masked keys and with a batch. Work is measured on every rank. Each exchange
is also left out once: if the result does not change, the proof is worth nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from port_kit.autoparallel.cache.prove import prove_cache
from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.prove_rank import Measured, Run, run_rank, run_single
from port_kit.autoparallel.results import (
    CONTROL_FACTOR,
    TOLERANCE,
    LayoutResult,
    difference,
    orderly,
    percent,
    refusals,
    short_reason,
)
from port_kit.autoparallel.subject import OTHER_SCALES, ModelScale, Subject
from port_kit.errors import PortKitError
from port_kit.parallel.cached_layout import split_cache
from port_kit.parallel.layout import Layout

#: Layouts of 1, 2 and 4 ranks.
DEFAULT_LAYOUTS = (
    *("tp2", "ulysses2", "ring2", "hsdp2", "cfg2"),
    *("tp4", "ulysses4", "ulysses2xring2", "tp2xulysses2", "hsdp2xcfg2"),
    *("cache_dit", "cache_ditxtp2", "cache_ditxulysses2"),
)
#: bfloat16: multiple of the difference between one rank's bfloat16 and float32 results.
BFLOAT16_FACTOR = 2.0
#: Part of the bytes of blocks that a rank may hold, as a multiple of its even share.
BYTES_FACTOR = 1.2
#: Part of the tokens that a rank may process, as a multiple of its even share: padding of short streams.
TOKENS_FACTOR = 1.3


class Prover:
    """Proofs of one plan; one rank's results are computed once.

    Args:
        subject: subject that the plan was inferred from.
        plan: the plan.
        scales: configurations besides ``inferred``.
        timeout: seconds per layout.
    """

    def __init__(
        self,
        subject: Subject,
        plan: Plan,
        scales: Mapping[str, ModelScale] = OTHER_SCALES,
        timeout: float = 240.0,
    ) -> None:
        from port_kit.testing.workers import warm_up

        warm_up()
        torch.set_num_threads(1)  # a forked rank that runs several would wait for threads it does not have
        self.subject, self.plan, self.timeout = subject, plan, timeout
        self.runs = [
            Run("inferred", ModelScale(), controls=True),
            *(Run(name, scale) for name, scale in scales.items()),
        ]
        self.single = [run_single(subject, plan, run) for run in self.runs]
        self.low = Run("inferred", ModelScale(), torch.bfloat16)
        self.single_low, self.low_error = _try_single(subject, plan, self.low)

    def prove(self, layout: Layout) -> LayoutResult:
        """Prove one layout. An error of a rank is a reason, not an exception."""
        result = LayoutResult(str(layout))
        if refused := refusals(self.plan, layout):
            result.reason = f"refused: {'; '.join(refused)}"
            return result
        runs = [*self.runs, *([self.low] if self.single_low else [])]
        try:
            ranks = self._run(layout, runs)
        except PortKitError as error:
            result.reason = short_reason(error)
            return result
        self._compare(result, layout, ranks)
        return result

    def _run(self, layout: Layout, runs: list[Run]) -> list[list[Measured]]:
        from port_kit.testing.workers import run_ranks

        with tempfile.TemporaryDirectory(prefix="port-kit-prove-") as folder:

            def work(rank: int) -> list[Measured]:
                return run_rank(self.subject, self.plan, runs, layout, rank, Path(folder))

            return run_ranks(layout.world, work, timeout=self.timeout)

    def _compare(self, result: LayoutResult, layout: Layout, ranks: list[list[Measured]]) -> None:
        first = self.single[0]
        for at, run in enumerate(self.runs):
            result.scales[run.scale] = max(
                difference(got, expected)
                for rank in ranks
                for got, expected in zip(rank[at].outputs, self.single[at].outputs, strict=True)
            )
        result.difference = max(result.scales.values())
        own = [rank[0] for rank in ranks]
        controls = {
            name: max(difference(rank.controls[name], first.outputs[0]) for rank in own) for name in own[0].controls
        }
        result.control = min(controls.values()) if controls else None
        result.tokens = _part([rank.tokens for rank in own], first.tokens)
        result.rows = _part([rank.rows for rank in own], first.rows)
        result.block_bytes = _part([rank.block_bytes for rank in own], first.block_bytes)
        result.exchanges = own[0].exchanges
        if self.single_low is not None:
            result.bfloat16 = self._bfloat16(ranks)
        result.reason = "; ".join(self._faults(result, layout, controls))
        result.proven = not result.reason

    def _bfloat16(self, ranks: list[list[Measured]]) -> float:
        """Return the largest difference from float32 as a multiple of one rank's, over inputs and ranks."""
        assert self.single_low is not None
        worst = 0.0
        for at, (exact, rounded) in enumerate(zip(self.single[0].outputs, self.single_low.outputs, strict=True)):
            own = max(difference(rounded, exact), 1e-3)
            worst = max([worst, *(difference(rank[-1].outputs[at], exact) / own for rank in ranks)])
        return worst

    def _faults(self, result: LayoutResult, layout: Layout, controls: Mapping[str, float]) -> Iterable[str]:
        if not (result.difference is not None and result.difference <= TOLERANCE):
            worst = max(result.scales, key=lambda scale: orderly(result.scales[scale]))
            yield f"differs from one rank by {result.difference:.1e} ({worst})"
        if result.bfloat16 is not None and not result.bfloat16 <= BFLOAT16_FACTOR:
            yield f"bfloat16 differs {result.bfloat16:.1f} times as much as one rank's rounding"
        for name, value in controls.items():
            if value < CONTROL_FACTOR * TOLERANCE:
                yield f"the result is the same without {name}"
        if layout.sequence > 1 and not _at_most(result.tokens, TOKENS_FACTOR / layout.sequence):
            yield f"a rank processes {percent(result.tokens)} of the tokens"
        holders = layout.tp * layout.hsdp
        if holders > 1 and not _at_most(result.block_bytes, BYTES_FACTOR / holders):
            yield f"a rank holds {percent(result.block_bytes)} of the bytes of the blocks"


def prove_plan(
    subject: Subject,
    plan: Plan,
    layouts: Sequence[str] = DEFAULT_LAYOUTS,
    scales: Mapping[str, ModelScale] = OTHER_SCALES,
) -> list[LayoutResult]:
    """Prove a plan for each layout, with or without Cache-DiT."""
    named = [split_cache(layout) for layout in layouts]
    prover = None if all(cached for cached, _ in named) else Prover(subject, plan, scales)
    results = []
    for cached, layout in named:
        if cached or prover is None:
            results.append(prove_cache(subject, plan, layout, scales))
        else:
            results.append(prover.prove(layout))
    return results


def with_proofs(plan: Plan, results: Iterable[LayoutResult]) -> Plan:
    """Return the plan with the proofs of proven layouts, in place of earlier ones of the same layouts."""
    results = list(results)
    kept = [proof for proof in plan.proofs if proof.layout not in {result.layout for result in results}]
    return plan.model_copy(update={"proofs": (*kept, *(proof for result in results for proof in result.proofs()))})


def _try_single(subject: Subject, plan: Plan, run: Run) -> tuple[Measured | None, str]:
    """Run one rank in bfloat16; some modules compute in float64 and cannot."""
    try:
        return run_single(subject, plan, run), ""
    except (RuntimeError, TypeError, ValueError) as error:
        return None, str(error)


def _part(own: Sequence[int], single: int) -> float | None:
    return max(own) / single if single else None


def _at_most(part: float | None, limit: float) -> bool:
    return part is not None and part <= limit
