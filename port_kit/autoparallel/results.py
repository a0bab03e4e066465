"""Results of proofs, and the comparison of outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from port_kit.autoparallel.plan import Plan, Proof
from port_kit.errors import ParallelError, PortKitError
from port_kit.parallel.layout import Layout

#: Largest difference relative to the largest value, float32.
TOLERANCE = 1e-4
#: A result with an exchange left out must differ by this multiple of the tolerance.
CONTROL_FACTOR = 10


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
        reconstruction: Cache-DiT: largest difference of steps that reuse from one that computes, with equal inputs.
        reused: Cache-DiT: steps that reused at a threshold between, by list of blocks.
        skipped: Cache-DiT: part of the calls of blocks that a step without a threshold leaves out.
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
    reconstruction: float | None = None
    reused: dict[str, int] = field(default_factory=dict)
    skipped: float | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-serializable values."""
        return asdict(self)

    def describe(self) -> str:
        """Return one line."""
        if self.difference is None:
            return f"FAIL {self.layout:<16} {self.reason}"
        control = "" if self.control is None else f"  control {self.control:.0e}"
        shares = {"tokens": self.tokens, "block bytes": self.block_bytes, "skipped calls": self.skipped}
        known = "".join(f"  {name} {percent(share)}" for name, share in shares.items() if share is not None)
        figures = f"difference {self.difference:.1e}{control}{known}"
        return f"{'ok  ' if self.proven else 'FAIL'} {self.layout:<16} {figures}  {self.reason}".rstrip()

    def proofs(self) -> list[Proof]:
        """Return one entry of a plan per configuration; none if the layout is not proven."""
        shares = {"control": self.control, "tokens": self.tokens, "block_bytes": self.block_bytes}
        scales = self.scales.items() if self.proven else ()
        return [
            Proof(layout=self.layout, scale=scale, dtype="float32", difference=difference, **shares)
            for scale, difference in scales
        ]


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest absolute difference relative to a tensor's largest value; infinite if shapes differ."""
    worst = 0.0
    if len(actual) != len(expected):
        return math.inf
    for got, want in zip(actual, expected, strict=True):
        if got.shape != want.shape:
            return math.inf
        value = ((got - want).abs().max() / want.abs().max().clamp(min=1e-12)).item()
        worst = max(worst, orderly(value))
    return worst


def orderly(value: float) -> float:
    """Return a number that compares: infinity in place of NaN."""
    return math.inf if math.isnan(value) else value


def short_reason(error: PortKitError) -> str:
    """Return the code and the first line of an error of a rank; the cause's if there is one."""
    cause = error.__cause__ if isinstance(error.__cause__, PortKitError) else error
    lines = str(cause).strip().splitlines()
    text = next((line for line in lines if line.strip()), "")
    code = cause.code if isinstance(cause, ParallelError) else type(cause).__name__
    return f"{code}: {text[:300]}"


def percent(part: float | None) -> str:
    """Return a part as text."""
    return "an unknown part" if part is None else f"{part:.0%}"


def refusals(plan: Plan, layout: Layout) -> list[str]:
    """Return the findings that exclude a layout. A module of which some parts can be split is split in part."""
    kinds = set(layout.degrees)
    if layout.sequence > 1 and not any(blocks.inputs for blocks in plan.blocks):
        kinds.add("sequence")
    if layout.tp > 1 and not plan.linears:
        kinds.add("tensor")
    return [refusal.reason for refusal in plan.refused if refusal.kind in kinds]
