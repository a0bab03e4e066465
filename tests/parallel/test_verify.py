"""``port-kit verify parallel``: output, and errors for ports that it cannot run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from port_kit.cli import main
from port_kit.errors import ParallelError
from port_kit.parallel.layout_selection import Device, choose_layouts
from port_kit.parallel.parallel_checks import FAULTS, Finding
from port_kit.parallel.preflight import ModelShape
from port_kit.parallel.verify import DEFAULT_LAYOUTS, LayoutReport, difference, port_test_case
from port_kit.registry import find_port


def test_the_shipped_port_on_two_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    layouts = ["ulysses2", "hsdp2"]
    options = [word for layout in layouts for word in ("--layout", layout)]
    main(["verify", "parallel", "dreamid_omni", *options, "--json"], standalone_mode=False)
    data = json.loads(capfd.readouterr().out)["data"]  # without other output: ranks write to stderr
    assert [layout["layout"] for layout in data["layouts"]] == layouts
    assert all(layout["ok"] for layout in data["layouts"])
    sequence, shards = data["layouts"]
    assert sequence["tokens"][1:] == [-(-sequence["tokens"][0] // 2)] * 2
    assert sequence["collectives"]["alltoall_base"]["bytes"] > 0
    assert shards["parameter_bytes"][1] < 0.55 * shards["parameter_bytes"][0]
    assert all(layout["max_abs"] <= 5e-6 for layout in data["layouts"])


def test_a_layout_that_does_not_exist_fails_before_any_run() -> None:
    result = CliRunner().invoke(main, ["verify", "parallel", "dreamid_omni", "--layout", "tp2xhsdp2"])
    assert result.exit_code == 1
    assert "parallel_degree" in result.output


def test_a_layout_that_the_model_cannot_have_is_refused_with_those_it_can() -> None:
    result = CliRunner().invoke(main, ["verify", "parallel", "dreamid_omni", "--layout", "ulysses3", "--json"])
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "parallel_degree"
    assert error["details"]["possible"]["cfg"] == [2, 4]


def test_a_device_that_vllm_is_not_built_for_is_refused() -> None:
    result = CliRunner().invoke(main, ["verify", "parallel", "dreamid_omni", "--device", "cuda"])
    assert result.exit_code == 1
    assert "parallel_device" in result.output


def test_only_layouts_that_fit_the_model_and_the_machine_are_run() -> None:
    shape = ModelShape(3, 3, widths=8, branches=4, split_bytes=80, replicated_bytes=8, block_bytes=10, sharded=True)
    two = Device("cuda", 2, 1e-4)
    chosen, left_out = choose_layouts((), DEFAULT_LAYOUTS, shape, two)
    assert chosen == ["ring2", "allgather2", "cfg2", "hsdp2", "hsdp2xcfg2"]
    assert {*left_out} == {*DEFAULT_LAYOUTS} - {*chosen}
    chosen, left_out = choose_layouts((), ("tp2", "ring3"), None, two)
    assert (chosen, [*left_out]) == (["tp2"], ["ring3"])
    with pytest.raises(ParallelError) as caught:
        choose_layouts(("ring3",), DEFAULT_LAYOUTS, None, two)
    assert caught.value.code == "parallel_degree"


def test_a_port_without_a_tiny_model_needs_one(tmp_path: Path) -> None:
    port = replace(find_port("dreamid_omni"), tiny_model="")
    with pytest.raises(ParallelError) as caught:
        port_test_case(port, tmp_path)
    assert caught.value.code == "parallel_subject"
    assert port_test_case(port, tmp_path, tmp_path / "mine").model == tmp_path / "mine"


def test_a_report_reports_each_finding_and_its_remedy() -> None:
    finding = Finding("padding_attended", "blocks.0.attn", "expected 31 keys in the kernel, got 32")
    report = LayoutReport("ring2", 2, 0.1, 0.1, (31, 16, 16), (8, 8, 8), {"send": (4, 64)}, [finding], 1.0)
    assert not report.ok
    assert "padding_attended at blocks.0.attn" in report.describe()
    assert FAULTS["padding_attended"] in report.describe()
    assert json.loads(json.dumps(report.to_json()))["findings"][0]["hint"] == FAULTS["padding_attended"]


def test_differences_of_nested_outputs() -> None:
    import numpy as np
    import torch

    frames, wave = np.zeros((2, 2), np.uint8), torch.zeros(3)
    other = {"video": frames + np.uint8(1), "audio": [wave + 0.5]}
    assert difference(other, {"video": frames, "audio": [wave]}) == 0.5
    assert difference(frames + np.uint8(3), frames) == 2.0
    assert difference(torch.full((3,), torch.nan), wave) == float("inf")
    assert difference(torch.zeros(2), wave) == float("inf")
