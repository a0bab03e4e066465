"""``port-kit verify parallel``: equal outputs on one and several ranks, with proof that work was divided.

A test case is a model directory and requests. Each layout runs in forked workers (:mod:`port_kit.testing.workers`), and
so does one rank. Outputs must agree, and each rank's record (:mod:`port_kit.parallel.recorder`) must show its share of
the work (:mod:`port_kit.parallel.parallel_checks`). If outputs differ, both runs are repeated with all module outputs,
and the first module that differs is reported.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from port_kit.errors import ParallelError
from port_kit.parallel import recorder
from port_kit.parallel.layout import Layout
from port_kit.parallel.layout_selection import read_model_shape
from port_kit.parallel.parallel_checks import Finding, branch_alone, compare, first_divergence
from port_kit.parallel.preflight import ModelShape, preflight
from port_kit.port import Port, lookup
from port_kit.testing.tiny_port import download_tiny
from port_kit.testing.workers import RankResult, Request, run_workers

#: Layouts of 2 to 4 ranks for ports with attention, guidance and blocks.
DEFAULT_LAYOUTS = (
    *("tp2", "ulysses2", "ring2", "ring3", "allgather2", "cfg2", "hsdp2"),
    *("ulysses2xring2", "tp2xulysses2", "ulysses2xcfg2", "hsdp2xulysses2", "hsdp2xcfg2"),
)
#: Largest absolute difference from one rank's output, float32.
TOLERANCE = 5e-6


@dataclass(frozen=True)
class ParallelTestCase:
    """A model directory and requests.

    Attributes:
        model: model directory.
        requests: requests, run in order on all ranks.
        config: fields of ``OmniDiffusionConfig``, without ``parallel_config``.
        setup: called with the number of ranks on each rank before its worker is built.
        output_tolerance: largest absolute difference of pipeline outputs, which decoders amplify. Integer frames may
            also differ by one.
        shape: of the transformer; None if unknown. Impossible layouts are then not refused before they run.
    """

    model: Path
    requests: Sequence[Request]
    config: Mapping[str, Any] = field(default_factory=dict)
    setup: Callable[[int], None] | None = None
    output_tolerance: float = TOLERANCE
    shape: ModelShape | None = None

    def run(self, layout: Layout, *, keep_outputs: bool = False) -> list[RankResult]:
        """Run on the layout's ranks. ``RankResult.probe`` holds a :class:`~port_kit.parallel.recorder.Trace`."""

        def prepare() -> None:
            os.dup2(2, 1)  # ranks log to stdout, which is reserved for data
            recorder.install(keep_outputs=keep_outputs)
            if self.setup:
                self.setup(layout.world)

        config = {**self.config, "parallel_config": layout.parallel_config}
        return run_workers(self.model, self.requests, config=config, setup=prepare, probe=recorder.collect)


@dataclass(frozen=True)
class LayoutReport:
    """Comparison of a layout with one rank.

    Attributes:
        layout: layout in the form that :meth:`Layout.parse` reads.
        world: number of ranks.
        max_abs: largest difference of transformer outputs over all calls and ranks; None if the run failed.
        output_max_abs: largest difference of pipeline outputs over all ranks; None if the run failed.
        tokens: tokens of the longest attention query: in the single-rank run, then per rank.
        parameter_bytes: bytes of transformer parameters: in the single-rank run, then per rank.
        collectives: collectives of rank 0, ``{operator: (calls, bytes)}``.
        findings: faults; empty if the layout is correct.
        seconds: duration of the layout's run.
    """

    layout: str
    world: int
    max_abs: float | None
    output_max_abs: float | None
    tokens: tuple[int, ...]
    parameter_bytes: tuple[int, ...]
    collectives: Mapping[str, tuple[int, int]]
    findings: Sequence[Finding]
    seconds: float

    @property
    def ok(self) -> bool:
        """True if outputs agree and the work was divided."""
        return not self.findings

    def describe(self) -> str:
        """Return one line, and per finding one more and the traceback of its rank."""
        lines = [f"{'ok  ' if self.ok else 'FAIL'} {self.layout:<22} {self._figures()}"]
        for finding in self.findings:
            lines.append(f"     {finding.fault} at {finding.where}: {finding.message} (hint: {finding.hint})")
            lines += [f"       {line}" for line in finding.traceback.splitlines()]
        return "\n".join(lines)

    def _figures(self) -> str:
        if self.max_abs is None:
            return f"{self.seconds:.1f} s"
        tokens = "+".join(map(str, self.tokens[1:]))
        share = max(self.parameter_bytes[1:]) / max(self.parameter_bytes[0], 1)
        calls = sum(count for count, _ in self.collectives.values())
        return (
            f"max abs {self.max_abs:.1e}  tokens {tokens} of {self.tokens[0]}  "
            f"weights per rank {share:.0%}  collectives {calls}  {self.seconds:.1f} s"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-serializable values."""
        findings = [{**asdict(finding), "hint": finding.hint} for finding in self.findings]
        return {
            "layout": self.layout,
            "world": self.world,
            "ok": self.ok,
            "max_abs": self.max_abs,
            "output_max_abs": self.output_max_abs,
            "tokens": list(self.tokens),
            "parameter_bytes": list(self.parameter_bytes),
            "collectives": {op: {"calls": calls, "bytes": size} for op, (calls, size) in self.collectives.items()},
            "findings": findings,
            "seconds": round(self.seconds, 2),
        }


def port_test_case(port: Port, scratch: Path, model: Path | None = None, prompt: str = "a cat") -> ParallelTestCase:
    """Return a port's tiny test case, or one for a model directory.

    Args:
        port: the port.
        scratch: empty folder for the tiny model.
        model: model directory to use instead of the tiny model. Each rank loads it in float32.
        prompt: prompt for ``model``.

    Raises:
        ParallelError: ``parallel_subject``; the port has no tiny model and ``model`` is None.
    """
    if model is not None:
        requests = [Request(prompt, {"num_inference_steps": 2, "seed": 0})]
        return ParallelTestCase(model, requests, shape=read_model_shape(port, model))
    if lookup(port.tiny_model) is None:
        raise ParallelError(
            f"Port {port.name} has no tiny model for verify parallel.",
            code="parallel_subject",
            hint=f"pass a small model directory with --model, or add TINY to {port.package}.config",
        )
    folder = Path(download_tiny(port, scratch / port.name).directory)
    return ParallelTestCase(
        folder, [tiny_request(port)], output_tolerance=port.output_tolerance, shape=read_model_shape(port, folder)
    )


def tiny_request(port: Port) -> Request:
    """Return a request with one of each kind of reference medium that the port accepts."""
    sampling = {"seed": 11, **port.tiny, **port.parallel}
    if "guidance_scale" in sampling:
        sampling["guidance_scale_provided"] = True
    media = {kind: _REFERENCES[kind]() for kind in port.references}
    prompt: dict[str, Any] = {"prompt": port.example_prompt or "a cat"}
    return Request({**prompt, "multi_modal_data": media} if media else prompt, sampling)


def _reference_image() -> list[Any]:
    return [Image.new("RGB", (96, 64), (200, 30, 90))]


def _reference_audio() -> list[Any]:
    """Return 2 s of noise at 16 kHz."""
    return [(0.1 * np.random.default_rng(1).standard_normal(33_000)).astype(np.float32)]


_REFERENCES: Mapping[str, Callable[[], list[Any]]] = {"image": _reference_image, "audio": _reference_audio}


def verify_parallel(
    test_case: ParallelTestCase, layouts: Iterable[str] = DEFAULT_LAYOUTS, *, tolerance: float = TOLERANCE
) -> Iterator[LayoutReport]:
    """Run one rank, then each layout; yield one report per layout.

    Raises:
        ParallelError: a layout is invalid, or impossible for the model, before anything runs; or the run on one rank
            fails.
    """
    parsed = [Layout.parse(text) for text in layouts]
    if test_case.shape is not None:
        for layout in parsed:
            preflight(layout, test_case.shape)
    single = test_case.run(Layout())[0]
    for layout in parsed:
        yield verify_layout(test_case, layout, single, tolerance=tolerance)


def verify_layout(
    test_case: ParallelTestCase, layout: Layout, single: RankResult, *, tolerance: float = TOLERANCE
) -> LayoutReport:
    """Run a layout and compare it with ``single``, the result of ``test_case.run(Layout())``."""
    started = time.monotonic()
    try:
        ranks = test_case.run(layout)
    except ParallelError as error:
        finding = _failure(error)
        return LayoutReport(str(layout), layout.world, None, None, (), (), {}, (finding,), time.monotonic() - started)
    traces = [rank.probe for rank in ranks]
    findings = compare(layout, single.probe, traces)
    max_abs = max(_flow_difference(layout, single.probe, trace) for trace in traces)
    output_max_abs = max(difference(rank.outputs, single.outputs) for rank in ranks)
    if max_abs > tolerance:
        findings.append(_diagnose(test_case, layout, f"flows differ from one rank's by {max_abs:.2e}", tolerance))
    elif output_max_abs > test_case.output_tolerance:
        message = f"pipeline outputs differ by {output_max_abs:.2e}, transformer flows agree"
        findings.append(Finding("outputs_differ", "pipeline", message))
    return LayoutReport(
        layout=str(layout),
        world=layout.world,
        max_abs=max_abs,
        output_max_abs=output_max_abs,
        tokens=tuple(_tokens(one) for one in (single.probe, *traces)),
        parameter_bytes=tuple(one.parameter_bytes for one in (single.probe, *traces)),
        collectives=traces[0].collectives,
        findings=findings,
        seconds=time.monotonic() - started,
    )


def _flow_difference(layout: Layout, single: recorder.Trace, rank: recorder.Trace) -> float:
    """Return the largest difference of a rank's flows from the same branch and step on one rank."""
    numbered = ((branch_alone(layout, single, rank, i), flow) for i, flow in enumerate(rank.flows))
    pairs = ((flow, single.flows[alone]) for alone, flow in numbered if alone < len(single.flows))
    return max((difference(flow, expected) for flow, expected in pairs), default=math.inf)


def _diagnose(test_case: ParallelTestCase, layout: Layout, seen: str, tolerance: float) -> Finding:
    """Repeat both runs with module outputs; return a finding for the first module that differs."""
    message = f"{seen}, tolerance {tolerance:.0e}"
    if layout.cfg > 1:
        return Finding("outputs_differ", "guidance", message)
    alone = test_case.run(Layout(), keep_outputs=True)[0].probe
    for rank in test_case.run(layout, keep_outputs=True):
        path = first_divergence(alone, rank.probe, 10 * tolerance)
        if path:
            return Finding("outputs_differ", path, f"{message}; first different module: {path} on rank {rank.rank}")
    return Finding("outputs_differ", "pipeline", f"{message}; no transformer module differs")


def _failure(error: ParallelError) -> Finding:
    """Return the finding for a failed run; distinguish HSDP conditions that match no module."""
    if "No modules were sharded" in error.message or "_hsdp_shard_conditions" in error.message:
        return Finding("weights_not_sharded", "transformer", "no module matches _hsdp_shard_conditions")
    where = f"rank {error.details.get('rank', '?')}"
    return Finding("failed", where, error.message.partition("\n")[0], str(error.details.get("traceback", "")))


def _tokens(one: recorder.Trace) -> int:
    return max((call.query for calls in one.attention.values() for call in calls), default=0)


def difference(actual: Any, expected: Any) -> float:
    """Return the largest absolute difference of two nested outputs; infinite if their shapes differ.

    Integers (decoded frames) that differ by one count as equal, because of rounding.
    """
    if isinstance(expected, np.ndarray):
        return difference(torch.from_numpy(actual), torch.from_numpy(expected))
    if isinstance(expected, Tensor):
        if not isinstance(actual, Tensor) or actual.shape != expected.shape:
            return math.inf
        delta = (actual.double() - expected.double()).abs()
        if not expected.is_floating_point():
            delta = (delta - 1).clamp(min=0)
        return torch.nan_to_num(delta, nan=math.inf).max().item() if delta.numel() else 0.0
    if isinstance(expected, Mapping):
        return max((difference(actual[key], value) for key, value in expected.items()), default=0.0)
    if isinstance(expected, (list, tuple)):
        return max((difference(a, b) for a, b in zip(actual, expected, strict=True)), default=0.0)
    return 0.0
