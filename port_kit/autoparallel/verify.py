"""Comparison of a pipeline on several ranks with one rank, by vLLM-Omni's own workers, and its work per rank.

The pipeline's transformers are adapted by plans: :mod:`port_kit.autoparallel.host` or
:mod:`port_kit.autoparallel.planned`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from port_kit.autoparallel.boundaries import ShardedModel
from port_kit.autoparallel.host.checks import check_layout, kinds_of
from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.ports import plan_file
from port_kit.errors import ParallelError
from port_kit.parallel.cached_layout import split_cache
from port_kit.parallel.layout import Layout
from port_kit.parallel.memory import local_bytes
from port_kit.port import Port
from port_kit.runtime.plugin import register_pipelines
from port_kit.testing.workers import Request, run_workers

#: Largest difference from one rank relative to the largest value, float32.
TOLERANCE = 1e-4
#: Least standard deviation of an output: a constant one hides every difference.
_SPREAD = 1e-3


@dataclass(frozen=True)
class Work:
    """Work of one rank.

    Attributes:
        calls: complete calls of the transformer.
        weight_bytes: bytes of the transformers' weights that it holds.
        exchanges: attention calls whose tokens or keys were exchanged between ranks; None if they are exchanged at
            linears, which count none.
    """

    calls: float
    weight_bytes: int
    exchanges: int | None


@dataclass(frozen=True)
class Comparison:
    """One layout of one pipeline.

    Attributes:
        layout: the layout.
        difference: largest difference from one rank, relative to the largest value, over all outputs.
        spread: least standard deviation of the outputs; 0 if one is constant.
        single: work of one rank.
        ranks: work of each rank of the layout.
    """

    layout: str
    difference: float
    spread: float
    single: Work
    ranks: tuple[Work, ...]

    @property
    def findings(self) -> list[str]:
        """Faults; empty if outputs agree and the work was divided."""
        layout = Layout.parse(self.layout)
        found = []
        if not self.difference <= TOLERANCE:
            found.append(f"differs from one rank by {self.difference:.1e}, tolerance {TOLERANCE:.0e}")
        if not self.spread >= _SPREAD:
            found.append("an output is constant")
        if layout.tp * layout.hsdp > 1 and not self.share < 1:
            found.append(f"a rank holds {self.share:.0%} of the weights")
        if layout.sequence > 1 and any(rank.exchanges == 0 for rank in self.ranks):
            found.append("no attention call exchanged tokens")
        if layout.cfg > 1 and not all(rank.calls < self.single.calls for rank in self.ranks):
            found.append("a rank computed all branches of guidance")
        return found

    @property
    def share(self) -> float:
        """Largest part of the weights that a rank holds."""
        return max(rank.weight_bytes for rank in self.ranks) / self.single.weight_bytes

    @property
    def ok(self) -> bool:
        """True if there are no findings."""
        return not self.findings

    def describe(self) -> str:
        """Return one line."""
        calls = "+".join(f"{rank.calls:g}" for rank in self.ranks)
        figures = (
            f"difference {self.difference:.1e}  weights per rank {self.share:.0%}  "
            f"calls {calls} of {self.single.calls:g}  exchanges {self.ranks[0].exchanges}"
        )
        return f"{'ok  ' if self.ok else 'FAIL'} {self.layout:<16} {figures}  {'; '.join(self.findings)}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON-serializable values."""
        return {**asdict(self), "ok": self.ok, "findings": self.findings}


def compare(
    folder: Path, request: Request, layouts: Iterable[str], config: Mapping[str, Any] | None = None
) -> Iterator[Comparison]:
    """Run a request on one rank, then in each layout.

    Args:
        folder: model directory.
        request: of a tiny output.
        layouts: as ``port-kit layout`` writes them.
        config: fields of ``OmniDiffusionConfig``, without ``parallel_config``.
    """

    def run(layout: Layout) -> list[Any]:
        given = {**(config or {}), "parallel_config": layout.parallel_config}
        return run_workers(folder, [request], config=given, setup=_prepare, probe=_work, timeout=300.0)

    single = run(Layout())[0]
    spread = min(float(value.float().std()) for value in _tensors(single.outputs[0]).values())
    for layout in map(Layout.parse, layouts):
        ranks = run(layout)
        differences = [_difference(rank.outputs[0], single.outputs[0]) for rank in ranks]
        yield Comparison(str(layout), max(differences), spread, single.probe, tuple(rank.probe for rank in ranks))


def _prepare() -> None:
    """Prepare a rank; its logs go to stderr, since stdout is reserved for data."""
    os.dup2(2, 1)
    register_pipelines()


def proven_layouts(port: Port) -> list[str]:
    """Return the layouts that the plan of a port proves, without those with Cache-DiT."""
    proofs = Plan.load(plan_file(port)).proofs
    return list(dict.fromkeys(proof.layout for proof in proofs if not split_cache(proof.layout)[0]))


def check_proven(port: Port, layouts: Iterable[str]) -> None:
    """Check that the plan of a port proves layouts, and that guidance has enough branches for them.

    Raises:
        ParallelError: ``plan_layout``, ``parallel_degree``.
    """
    plan = Plan.load(plan_file(port))
    for layout in map(Layout.parse, layouts):
        if layout.cfg > port.guidance_branches:
            raise ParallelError(
                f"cfg {layout.cfg} has more ranks than the {port.guidance_branches} branches",
                code="parallel_degree",
                hint=f"use at most cfg{port.guidance_branches}, or set guidance_branches of PORT",
            )
        if kinds_of(layout, cached=False):
            check_layout(layout, plan)


def _work(pipeline: Any) -> Work:
    sharded = [adapted.sharded for adapted in pipeline.adapted.values() if adapted.sharded is not None]
    guidance = getattr(pipeline, "guidance", None)
    return Work(
        calls=pipeline.computed if guidance is None else guidance.computed,
        weight_bytes=sum(local_bytes(getattr(pipeline, name)) for name in pipeline.adapted),
        exchanges=sum(map(_exchanges, sharded)) if any(model.routers for model in sharded) else None,
    )


def _exchanges(model: ShardedModel) -> int:
    return sum(count for kind, count in model.exchanges().items() if kind != "local")


def _tensors(output: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return the largest relative difference; infinite if outputs differ in kind or shape, or are not finite.

    Integers (decoded frames) that differ by one count as equal, because of rounding.
    """
    got, expected = _tensors(one), _tensors(other)
    if {name: value.shape for name, value in got.items()} != {name: value.shape for name, value in expected.items()}:
        return float("inf")
    worst = 0.0
    for name, value in expected.items():
        delta = (got[name].double() - value.double()).abs()
        if not value.is_floating_point():
            delta = (delta - 1).clamp(min=0)
        difference = float(delta.max() / value.double().abs().max())
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst
