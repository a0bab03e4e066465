"""The fusion transformer on several ranks: the same flows as on one, and proof that each rank did its share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from port_kit.parallel.layout import Layout
from port_kit.parallel.verify import ParallelTestCase, verify_layout
from port_kit.testing.workers import RankResult
from tests.helpers import slow
from tests.parallel.transformer_pipeline import GOLDENS, INPUTS

LAYOUTS = ("ring3", "allgather2", "cfg2", "tp2xulysses2", "hsdp2xcfg2")
SLOW = (
    *("tp2", "ulysses2", "ring2", "hsdp2"),
    *("tp4", "ulysses4", "ring4", "allgather4", "cfg4", "hsdp4"),
    *("ulysses2xring2", "ulysses2xcfg2", "hsdp2xulysses2", "tp2xulysses2xcfg2"),
)


def test_one_rank_reproduces_the_recorded_outputs(single: RankResult, goldens: Path) -> None:
    """The result of one rank is correct: the first golden's first branch equals the recorded one."""
    expected = load_file(goldens / "fusion" / GOLDENS[0] / "outputs_fp32.safetensors")
    flow = single.probe.flows[4 * len(INPUTS)]
    for name, mine in zip(("vid.0", "audio.0"), flow, strict=True):
        torch.testing.assert_close(mine[0], expected[name], rtol=0, atol=5e-5)


@pytest.mark.parametrize("layout", [*LAYOUTS, *slow(*SLOW)])
def test_ranks_compute_the_result_of_one(layout: str, subject: ParallelTestCase, single: RankResult) -> None:
    parsed = Layout.parse(layout)
    report = verify_layout(subject, parsed, single)
    assert report.ok, report.findings
    assert max(report.max_abs, report.output_max_abs) <= 5e-6
    assert report.world == parsed.world
    whole, *local = report.tokens
    assert all(count == -(-whole // parsed.sequence) for count in local)
    everything, *held = report.parameter_bytes
    assert all(size / everything <= 1 / (parsed.tp * parsed.hsdp) + 0.02 for size in held)
    assert sum(calls for calls, _ in report.collectives.values()) > 8
