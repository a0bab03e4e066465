"""Proof of a plan: several ranks compute what one rank computes, and divide the work.

Each layout runs on forked ranks with vLLM-Omni's process groups, at the configuration that the plan was inferred from
and at others, in float32 and bfloat16, with masked keys and with a batch. Work is measured on every rank. Each exchange
is also left out once: if the result does not change, the proof is worth nothing.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from port_kit.autoparallel.plan import Plan, Proof
from port_kit.autoparallel.prove_rank import Measured, Run, run_rank, run_single
from port_kit.autoparallel.subject import OTHER_SCALES, ModelScale, Subject
from port_kit.errors import ParallelError, PortKitError
from port_kit.parallel.layout import Layout

#: Layouts of 2 and 4 ranks.
DEFAULT_LAYOUTS = (
    *("tp2", "ulysses2", "ring2", "hsdp2", "cfg2"),
    *("tp4", "ulysses4", "ulysses2xring2", "tp2xulysses2", "hsdp2xcfg2"),
)
#: Largest difference relative to the largest value, float32.
TOLERANCE = 1e-4
#: A result with an exchange left out must differ by this multiple of the tolerance.
CONTROL_FACTOR = 10
#: bfloat16: multiple of the difference between one rank's bfloat16 and float32 results.
BFLOAT16_FACTOR = 2.0
#: Part of the bytes of blocks that a rank may hold, as a multiple of its even share.
BYTES_FACTOR = 1.2
#: Part of the tokens that a rank may process, as a multiple of its even share: padding of short streams.
TOKENS_FACTOR = 1.3


@dataclass
class LayoutResult:
    """Result of one layout.

    Attributes:
        layout: as :meth:`~port_kit.parallel.layout.Layout.parse` reads it.
        proven: all configurations agree with one rank, all controls notice, and the work was divided.
        difference: largest difference from one rank in float32, relative to the largest value; None if it failed.
        control: smallest such difference with an exchange left out; None without an exchange.
        tokens: largest part of the tokens of blocks that a rank processed.
        rows: the same for rows that enter linears of blocks, which include modulation and texts.
        block_bytes: largest part of the bytes of the blocks that a rank held.
        exchanges: attention calls by kind of exchange.
        bfloat16: difference in bfloat16 divided by that between one rank's bfloat16 and float32; None if not run.
        scales: configurations with their difference.
        reason: finding if the layout is not proven, else empty.
    """

    layout: str
    proven: bool = False
    difference: float | None = None
    control: float | None = None
    tokens: float | None = None
    rows: float | None = None
    block_bytes: float | None = None
    exchanges: dict[str, int] = field(default_factory=dict)
    bfloat16: float | None = None
    scales: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-serializable values."""
        return asdict(self)

    def describe(self) -> str:
        """Return one line."""
        if self.difference is None:
            return f"FAIL {self.layout:<16} {self.reason}"
        control = "" if self.control is None else f"  control {self.control:.0e}"
        figures = (
            f"difference {self.difference:.1e}{control}  tokens {_percent(self.tokens)}  "
            f"block bytes {_percent(self.block_bytes)}"
        )
        return f"{'ok  ' if self.proven else 'FAIL'} {self.layout:<16} {figures}  {self.reason}".rstrip()

    def proofs(self) -> list[Proof]:
        """Return one entry of a plan per configuration; none if the layout is not proven."""
        shares = {"control": self.control, "tokens": self.tokens, "block_bytes": self.block_bytes}
        scales = self.scales.items() if self.proven else ()
        return [
            Proof(layout=self.layout, scale=scale, dtype="float32", difference=difference, **shares)
            for scale, difference in scales
        ]


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
        if refused := _refusals(self.plan, layout):
            result.reason = f"refused: {'; '.join(refused)}"
            return result
        runs = [*self.runs, *([self.low] if self.single_low else [])]
        try:
            ranks = self._run(layout, runs)
        except PortKitError as error:
            result.reason = _short(error)
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
            worst = max(result.scales, key=lambda scale: _orderly(result.scales[scale]))
            yield f"differs from one rank by {result.difference:.1e} ({worst})"
        if result.bfloat16 is not None and not result.bfloat16 <= BFLOAT16_FACTOR:
            yield f"bfloat16 differs {result.bfloat16:.1f} times as much as one rank's rounding"
        for name, value in controls.items():
            if value < CONTROL_FACTOR * TOLERANCE:
                yield f"the result is the same without {name}"
        if layout.sequence > 1 and not _at_most(result.tokens, TOKENS_FACTOR / layout.sequence):
            yield f"a rank processes {_percent(result.tokens)} of the tokens"
        holders = layout.tp * layout.hsdp
        if holders > 1 and not _at_most(result.block_bytes, BYTES_FACTOR / holders):
            yield f"a rank holds {_percent(result.block_bytes)} of the bytes of the blocks"


def prove_plan(
    subject: Subject,
    plan: Plan,
    layouts: Sequence[str] = DEFAULT_LAYOUTS,
    scales: Mapping[str, ModelScale] = OTHER_SCALES,
) -> list[LayoutResult]:
    """Prove a plan for each layout."""
    prover = Prover(subject, plan, scales)
    return [prover.prove(Layout.parse(layout)) for layout in layouts]


def with_proofs(plan: Plan, results: Iterable[LayoutResult]) -> Plan:
    """Return the plan with the proofs of proven layouts, in place of earlier ones of the same layouts."""
    results = list(results)
    kept = [proof for proof in plan.proofs if proof.layout not in {result.layout for result in results}]
    return plan.model_copy(update={"proofs": (*kept, *(proof for result in results for proof in result.proofs()))})


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest absolute difference relative to a tensor's largest value; infinite if shapes differ."""
    worst = 0.0
    if len(actual) != len(expected):
        return math.inf
    for got, want in zip(actual, expected, strict=True):
        if got.shape != want.shape:
            return math.inf
        value = ((got - want).abs().max() / want.abs().max().clamp(min=1e-12)).item()
        worst = max(worst, _orderly(value))
    return worst


def _orderly(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _try_single(subject: Subject, plan: Plan, run: Run) -> tuple[Measured | None, str]:
    """Run one rank in bfloat16; some modules compute in float64 and cannot."""
    try:
        return run_single(subject, plan, run), ""
    except (RuntimeError, TypeError, ValueError) as error:
        return None, str(error)


def _refusals(plan: Plan, layout: Layout) -> list[str]:
    """Return the findings that exclude a layout. A module of which some parts can be split is split in part."""
    kinds = set(layout.degrees)
    if layout.sequence > 1 and not any(blocks.inputs for blocks in plan.blocks):
        kinds.add("sequence")
    if layout.tp > 1 and not plan.linears:
        kinds.add("tensor")
    return [refusal.reason for refusal in plan.refused if refusal.kind in kinds]


def _short(error: PortKitError) -> str:
    """Return the code and the first line of an error of a rank; the cause's if there is one."""
    cause = error.__cause__ if isinstance(error.__cause__, PortKitError) else error
    lines = str(cause).strip().splitlines()
    text = next((line for line in lines if line.strip()), "")
    code = cause.code if isinstance(cause, ParallelError) else type(cause).__name__
    return f"{code}: {text[:300]}"


def _part(own: Sequence[int], single: int) -> float | None:
    return max(own) / single if single else None


def _at_most(part: float | None, limit: float) -> bool:
    return part is not None and part <= limit


def _percent(part: float | None) -> str:
    return "an unknown part" if part is None else f"{part:.0%}"
