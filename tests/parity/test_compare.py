"""``port-kit verify parity``: goldens run from the command line, and the harness's own verdicts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from port_kit.cli import main
from port_kit.errors import ParityError
from port_kit.parity import Bound, Case, Pair, compare, run_case
from tests.helpers import raises


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["verify", "parity", *arguments])
    return result.exit_code, result.stdout


def test_cases_are_chosen_by_pattern_and_reported_as_json(goldens: Path) -> None:
    code, out = run("dreamid_omni", "--goldens", str(goldens), "--only", "scheduler/*", "--json")
    envelope = json.loads(out)
    assert code == 0 and envelope["ok"] and envelope["schema"] == "port-kit/1"
    cases = envelope["data"]["cases"]
    assert [case["case"] for case in cases] == [f"scheduler/{name} fp32+bf16" for name in ("unipc", "dpm++", "euler")]
    assert all(case["max_abs"] <= 1e-6 and case["first_divergence"] is None for case in cases)


def test_a_damaged_golden_fails_and_says_where(goldens: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("SET.json", "scheduler/scheduler.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((goldens / name).read_bytes())
    tensors = load_file(goldens / "scheduler/scheduler.safetensors")
    tensors["unipc.traj.fp32.2.prev"] = tensors["unipc.traj.fp32.2.prev"] + 1e-3
    save_file(tensors, tmp_path / "scheduler/scheduler.safetensors")
    code, out = run("dreamid_omni", "--goldens", str(tmp_path), "--only", "scheduler/unipc*", "--json")
    (case,) = json.loads(out)["data"]["cases"]
    assert code == 1 and not case["ok"]
    assert "fp32.2" in case["first_divergence"]
    assert case["max_abs"] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("nothing_omni", "--goldens", "."), "port_not_found"),
        (("dreamid_omni", "--goldens", "/nowhere"), "goldens_invalid"),
        (("dreamid_omni", "--goldens", "."), "goldens_invalid"),
    ],
)
def test_what_cannot_be_run_says_why(arguments: tuple[str, ...], code: str, tmp_path: Path) -> None:
    arguments = tuple(str(tmp_path) if argument == "." else argument for argument in arguments)
    exit_code, out = run(*arguments, "--json")
    assert exit_code == 1
    assert json.loads(out)["error"]["code"] == code


def test_a_pattern_without_cases_is_an_error(goldens: Path) -> None:
    exit_code, out = run("dreamid_omni", "--goldens", str(goldens), "--only", "nothing/*", "--json")
    assert exit_code == 1
    assert json.loads(out)["error"]["code"] == "parity_no_cases"


def test_a_value_that_is_not_finite_is_never_within_a_bound() -> None:
    ones = torch.ones(3)
    difference = compare(Pair("x", ones * math.nan, ones, Bound(max_abs=1e9)))
    assert not difference.ok


def test_shapes_must_be_equal() -> None:
    with pytest.raises(ParityError) as caught:
        compare(Pair("x", torch.ones(3), torch.ones(1, 3), Bound(max_abs=1.0)))
    assert caught.value.code == "parity_shape"


def test_the_first_pair_outside_its_bound_names_the_divergence() -> None:
    ones = torch.ones(2)
    pairs = [
        Pair(name, ones + offset, ones, Bound(max_abs=0.1)) for name, offset in (("a", 0.0), ("b", 1.0), ("c", 2.0))
    ]
    report = run_case(Case("case", lambda: pairs))
    assert (report.ok, report.first_divergence, report.to_json()["max_abs"]) == (False, "b", 2.0)


def test_a_case_that_compares_nothing_is_an_error() -> None:
    with raises("parity_no_cases", "case"):
        run_case(Case("case", list))
