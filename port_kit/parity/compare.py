"""Comparison of a port with recorded goldens.

A *golden* is an input together with the output of the original implementation. A port lists its
golden cases with the function named in :attr:`port_kit.port.Port.parity`::

    def cases(goldens: Path) -> Iterator[Case]: ...

Each :class:`Case` yields :class:`Pair` objects in the order in which the model computes them, so that the first pair
outside its bound names the first module that diverges. This module imports torch only while cases run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.errors import ParityError
from port_kit.escape import quoted
from port_kit.port import Port, lookup, resolve

if TYPE_CHECKING:
    import torch


#: Lists the cases of a port that declares its original, but no cases of its own.
RECORDED = "port_kit.pipeline.parity_cases:recorded_cases"


@dataclass(frozen=True)
class Bound:
    """Allowed difference from the original implementation.

    Attributes:
        max_abs: largest absolute difference of any element, or None for no bound.
        rel_l2: largest ``|actual - expected| / |expected|`` in the 2-norm, or None for no bound.
        why: the reason for the bound, one line.
    """

    max_abs: float | None = None
    rel_l2: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Pair:
    """One tensor of the port and its expected value, compared in float64. Shapes must be equal."""

    name: str
    actual: torch.Tensor
    expected: torch.Tensor
    bound: Bound


@dataclass(frozen=True)
class Case:
    """One golden case.

    Attributes:
        name: path of the case in the goldens' folder plus its dtype (``fusion/dreamid_two_refs fp32``).
        run: computes the pairs, in the order of the forward pass; called once.
    """

    name: str
    run: Callable[[], Iterable[Pair]]


@dataclass(frozen=True)
class Difference:
    """Difference of one pair. ``max_rel`` is ``max_abs`` over the largest absolute expected value."""

    name: str
    max_abs: float
    max_rel: float
    rel_l2: float
    bound: Bound
    ok: bool

    def to_json(self) -> dict[str, Any]:
        """Return the difference as JSON-serializable values."""
        return {
            "name": self.name,
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "rel_l2": self.rel_l2,
            "bound": {"max_abs": self.bound.max_abs, "rel_l2": self.bound.rel_l2, "why": self.bound.why},
            "ok": self.ok,
        }


@dataclass(frozen=True)
class CaseReport:
    """A case's differences, in forward order."""

    name: str
    seconds: float
    differences: Sequence[Difference] = field(default_factory=tuple)

    @property
    def ok(self) -> bool:
        """True if every pair is within its bound."""
        return all(difference.ok for difference in self.differences)

    @property
    def first_divergence(self) -> str | None:
        """Name of the first pair outside its bound: the first module that diverges."""
        return next((difference.name for difference in self.differences if not difference.ok), None)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-serializable values."""
        return {
            "case": self.name,
            "ok": self.ok,
            "max_abs": max((d.max_abs for d in self.differences), default=0.0, key=_nan_first),
            "max_rel": max((d.max_rel for d in self.differences), default=0.0, key=_nan_first),
            "rel_l2": max((d.rel_l2 for d in self.differences), default=0.0, key=_nan_first),
            "first_divergence": self.first_divergence,
            "seconds": round(self.seconds, 3),
            "differences": [difference.to_json() for difference in self.differences],
        }


def run_parity(port: Port, goldens: Path, *, only: str = "*") -> Iterator[CaseReport]:
    """Run a port's golden cases, one report each.

    Args:
        port: names a ``parity`` function, or has an ``ORIGINAL``, whose records are compared then.
        goldens: folder in the layout of ``docs/goldens.md``.
        only: shell pattern over case names.

    Raises:
        ParityError: the port has no cases, the folder is no goldens folder, or no case matches.
    """
    if not port.parity and lookup(port.original) is None:
        raise ParityError(f"port {port.name} declares no golden cases", code="parity_no_cases")
    if not goldens.is_dir():
        raise ParityError(
            f"{goldens} is not a folder", code="goldens_invalid", hint="give the folder that holds SET.json"
        )
    list_cases: Any = resolve(port.parity or RECORDED)
    names = []
    for case in list_cases(goldens):
        names.append(case.name)
        if fnmatchcase(case.name, only):
            yield run_case(case)
    if not any(fnmatchcase(name, only) for name in names):
        raise ParityError(
            f"no golden case in {goldens} matches {quoted(only)}",
            code="parity_no_cases",
            hint=f"cases there: {', '.join(names) or 'none'}",
        )


def run_case(case: Case) -> CaseReport:
    """Run one case and compare all of its pairs."""
    started = time.monotonic()
    try:
        differences = tuple(compare(pair) for pair in case.run())
    except ParityError as error:
        raise ParityError(f"case {case.name}: {error.message}", code=error.code, hint=error.hint) from error
    if not differences:
        raise ParityError(f"case {case.name} compares nothing", code="parity_no_cases")
    return CaseReport(case.name, time.monotonic() - started, differences)


def compare(pair: Pair) -> Difference:
    """Compare one pair in float64; values that are not finite and unequal shapes are never within a bound."""
    if pair.actual.shape != pair.expected.shape:
        raise ParityError(
            f"{pair.name} has shape {tuple(pair.actual.shape)}, expected {tuple(pair.expected.shape)}",
            code="parity_shape",
            hint="check the golden's dims in SET.json against the component's configuration",
        )
    actual, expected = pair.actual.detach().cpu().double(), pair.expected.detach().cpu().double()
    delta = (actual - expected).abs()
    max_abs = delta.max().item() if delta.numel() else 0.0
    scale = expected.abs().max().item() if expected.numel() else 0.0
    norm = expected.norm().item()
    rel_l2 = _ratio(delta.norm().item(), norm)
    return Difference(
        pair.name, max_abs, _ratio(max_abs, scale), rel_l2, pair.bound, _within(pair.bound, max_abs, rel_l2)
    )


def _within(bound: Bound, max_abs: float, rel_l2: float) -> bool:
    if bound.max_abs is None and bound.rel_l2 is None:
        raise ValueError("a Bound needs max_abs, rel_l2 or both")
    checks = ((max_abs, bound.max_abs), (rel_l2, bound.rel_l2))
    return all(value <= limit for value, limit in checks if limit is not None)


def _ratio(value: float, base: float) -> float:
    if base == 0.0:
        return 0.0 if value == 0.0 else math.inf
    return value / base


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value
