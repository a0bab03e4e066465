"""Request features through vLLM-Omni's own engine in step execution, in processes of its own. One start for all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from port_kit.testing.forkserver import run_forked

SCRIPT = Path(__file__).with_name("run_options.py")


Pair = tuple[torch.Tensor, torch.Tensor]


def matrices(model: Path, module: str, width: int) -> Pair:
    """Return A and B of a linear, whose outputs are those of the checkpoint if it has the linear."""
    rows, columns = width, width
    for file in (model / "transformer").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            if f"{module}.weight" in opened.keys():
                rows, columns = opened.get_slice(f"{module}.weight").get_shape()
    return torch.randn(4, columns) / columns**0.5, torch.randn(rows, 4)


def write(file: Path, adapters: dict[str, Pair]) -> None:
    """Write a LoRA."""
    tensors = {
        f"diffusion_model.{module}.lora_{kind}.weight": matrix.contiguous()
        for module, pair in adapters.items()
        for kind, matrix in zip("AB", pair, strict=True)
    }
    save_file(tensors, file)


def load_pair(file: Path, module: str, scale: float) -> Pair:
    """Return A, and B by a scale."""
    tensors = load_file(file)
    a, b = (tensors[f"diffusion_model.{module}.lora_{kind}.weight"] for kind in "AB")
    return a, b * scale


@pytest.fixture(scope="module")
def answers(ovi_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The engine's answers by request."""
    folder = tmp_path_factory.mktemp("features")
    width = json.loads((ovi_model / "transformer/config.json").read_text(encoding="utf-8"))["video"]["dim"]
    torch.manual_seed(0)
    good, other = "video_model.blocks.0.self_attn.v", "audio_model.blocks.1.ffn.0"
    for name, modules in {"good": [good], "more": [good, other], "wrong": ["unet.mid_block.attn.to_q"]}.items():
        write(folder / f"{name}.safetensors", {module: matrices(ovi_model, module, width) for module in modules})
    summed = {other: load_pair(folder / "more.safetensors", other, 0.5)}
    halves = [load_pair(folder / f"{name}.safetensors", good, scale) for name, scale in (("good", 2.0), ("more", 0.5))]
    summed[good] = torch.cat([a for a, _ in halves]), torch.cat([b for _, b in halves], dim=1)
    write(folder / "sum.safetensors", summed)
    report = folder / "report.json"
    loras = [str(folder / f"{name}.safetensors") for name in ("good", "more", "sum", "wrong")]
    command = [sys.executable, str(SCRIPT), str(ovi_model), *loras, str(report)]
    done = run_forked(command, timeout=400, PORT_KIT_CACHE=str(folder / "cache"))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(report.read_text(encoding="utf-8"))


def same(one: dict[str, Any], other: dict[str, Any], row: int = 0) -> bool:
    """Return True if sums of a request's video ``row`` and of the other's first agree; batches round differently."""
    video = abs(one["video"][row] / other["video"][0] - 1) < 1e-5
    return video and one["audio"][row] == pytest.approx(other["audio"][0], rel=1e-3)


def test_concurrent_requests_equal_single_requests(answers: dict[str, dict[str, Any]]) -> None:
    assert answers["alone"]["shape"] == [[121, 32, 96, 3]]
    assert same(answers["first"], answers["alone"])
    assert not same(answers["second"], answers["alone"])
    assert answers["first"]["ended"] < answers["second"]["ended"], "two steps end before four that began with them"


def test_a_request_that_was_given_up_leaves_the_engine_to_the_others(answers: dict[str, dict[str, Any]]) -> None:
    assert answers["still running"]["yes"]
    assert {**answers["again"], "ended": 0} == {**answers["alone"], "ended": 0}


def test_a_refused_request_is_the_clients_error(answers: dict[str, dict[str, Any]]) -> None:
    assert answers["no steps named"]["status"] == 400
    assert "num_inference_steps is 0" in answers["no steps named"]["error"]


def test_several_videos_have_the_next_seeds(answers: dict[str, dict[str, Any]]) -> None:
    assert len(answers["two"]["video"]) == len(answers["two"]["audio"]) == 2
    assert same(answers["two"], answers["alone"]) and same(answers["two"], answers["next seed"], 1)
    assert not same(answers["two"], answers["alone"], 1)


def test_a_lora_holds_for_its_request_and_a_wrong_one_is_refused(answers: dict[str, dict[str, Any]]) -> None:
    assert not same(answers["lora"], answers["alone"])
    assert "belongs to no module" in answers["wrong lora"]["error"]
    assert answers["wrong lora"]["status"] == 400


def test_several_loras_act_as_the_sum_of_them(answers: dict[str, dict[str, Any]]) -> None:
    assert same(answers["set"], answers["sum"])
    assert not any(same(answers["set"], answers[name]) for name in ("alone", "lora", "more"))
