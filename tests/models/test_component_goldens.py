"""The components against recorded outputs of the original implementation."""

from __future__ import annotations

from pathlib import Path

import pytest

from port_kit.models.wan.parity import component_cases
from port_kit.parity import Pair, compare, run_case

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


@pytest.mark.parametrize("name", CASES)
def test_case_is_within_its_bounds(goldens: Path, name: str) -> None:
    by_name = {case.name: case for case in component_cases.cases(goldens)}
    report = run_case(by_name[name])
    assert report.ok, [d.to_json() for d in report.differences if not d.ok]


def test_every_case_of_the_folder_is_tested(goldens: Path) -> None:
    assert tuple(sorted(case.name for case in component_cases.cases(goldens))) == tuple(sorted(CASES))


def test_solvers_give_the_very_bits(goldens: Path) -> None:
    for solver in ("unipc", "dpm++", "euler"):
        pairs: list[Pair] = list(component_cases.run_scheduler(goldens, solver))
        assert len(pairs) == 20
        assert {compare(pair).max_abs for pair in pairs} == {0.0}


def test_recorded_outputs_are_all_compared(goldens: Path) -> None:
    from safetensors import safe_open

    with safe_open(goldens / "mmaudio" / "outputs_fp32.safetensors", framework="pt") as file:
        recorded = set(file.keys())
    assert {pair.name for pair in component_cases.run_mmaudio(goldens, "fp32")} == recorded
