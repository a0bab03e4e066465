"""Careless use of ``Omni``: the report of ``run_careless.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from port_kit.testing.forkserver import run_forked
from port_kit.upstream.series import installed_series
from tests.models.test_admission import write_lora

SCRIPT = Path(__file__).with_name("run_careless.py")
#: Words of the error by series of vLLM-Omni: from 0.32 on, it is upstream's own, and names the directory.
DAMAGED_INDEX = {
    "0.30": ("model_incomplete", "damaged_index/model_index.json", "cannot read"),
    "0.32": ("/damaged_index", "did not resolve"),
}


@pytest.fixture(scope="module")
def report(ovi_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of the script on the tiny Ovi."""
    folder = tmp_path_factory.mktemp("careless")
    for seed, (name, rank) in enumerate({"a": 4, "b": 4, "wide": 48}.items()):
        write_lora(folder / f"{name}.safetensors", ovi_model, rank=rank, seed=seed)
    (folder / "damaged.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:-9])
    file = folder / "report.json"
    command = [sys.executable, str(SCRIPT), str(ovi_model), str(folder), str(file)]
    done = run_forked(command, timeout=900)
    assert file.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_a_list_serves_the_good_requests_and_names_the_others(report: dict[str, Any]) -> None:
    assert report["list"]["kind"] == "RefusedRequests"
    assert "2 of 4" in report["list"]["text"]
    assert report["results"] == report["alone"]
    assert "input_missing" in report["refused"]["1"] and "input_unreadable" in report["refused"]["3"]
    assert report["one"]["kind"] == "OmniClientError" and report["one"]["status"] == 400


def test_two_adapters_with_one_number_give_two_results(report: dict[str, Any]) -> None:
    assert len({report[name] for name in ("a", "b", "wide")}) == 3


def test_a_result_does_not_depend_on_earlier_adapters(report: dict[str, Any]) -> None:
    assert report["a"] == report["a again"] == report["a after errors"]


@pytest.mark.parametrize(("name", "code"), [("missing", "source_missing"), ("damaged", ""), ("a", "lora_scale")])
def test_a_wrong_adapter_is_the_clients_error(report: dict[str, Any], name: str, code: str) -> None:
    assert report[f"error {name}"]["status"] == 400
    assert code in report[f"error {name}"]["text"]


def test_a_closed_engine_says_so(report: dict[str, Any]) -> None:
    assert "engine_closed" in report["closed"]["text"]


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("tokenizer", ("model_incomplete", "tokenizer")),
        ("area", ("model_incomplete", "model_index.json", "video_area", "-5")),
        ("index", DAMAGED_INDEX[installed_series()]),
    ],
)
def test_a_damaged_directory_is_named(report: dict[str, Any], what: str, names: tuple[str, ...]) -> None:
    text = report["damaged"][what]["text"]
    assert all(name in text for name in names), text
