"""The components against recorded outputs of the original implementation."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from port_kit.models.wan.parity import component_cases
from port_kit.parity import CaseReport, Pair, compare, run_case

CASES = (
    "scheduler/unipc fp32+bf16",
    "scheduler/dpm++ fp32+bf16",
    "scheduler/euler fp32+bf16",
    "umt5 fp32",
    "umt5 bf16",
    "mmaudio fp32",
    "mmaudio bf16",
    "wan_vae fp32",
    "wan_vae bf16 weights",
)


@functools.cache
def run(goldens: Path, name: str) -> CaseReport:
    """Run a case once."""
    by_name = {case.name: case for case in component_cases.cases(goldens)}
    return run_case(by_name[name])


@pytest.mark.parametrize("name", CASES)
def test_case_is_within_its_bounds(goldens: Path, name: str) -> None:
    report = run(goldens, name)
    assert report.ok, [d.to_json() for d in report.differences if not d.ok]


def test_every_case_of_the_folder_is_tested(goldens: Path) -> None:
    assert tuple(sorted(case.name for case in component_cases.cases(goldens))) == tuple(sorted(CASES))


def test_solvers_differ_by_rounding_alone(goldens: Path) -> None:
    for solver in ("unipc", "dpm++", "euler"):
        pairs: list[Pair] = list(component_cases.run_scheduler(goldens, solver))
        assert len(pairs) == 20
        # Equal bits on the machine that recorded them; vector units of other CPUs round the last bit differently.
        assert max(compare(pair).max_abs for pair in pairs) <= 1e-6


def test_recorded_outputs_are_all_compared(goldens: Path) -> None:
    from safetensors import safe_open

    with safe_open(goldens / "mmaudio" / "outputs_fp32.safetensors", framework="pt") as file:
        recorded = set(file.keys())
    assert {difference.name for difference in run(goldens, "mmaudio fp32").differences} == recorded
