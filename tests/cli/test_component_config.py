"""Commands compare a checkpoint with the configuration beside it, such as that of a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from port_kit.cli import main
from port_kit.registry import find_port
from port_kit.testing import download_tiny
from port_kit.testing.hub import Hub

Run = Callable[..., tuple[int, Any, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model directory of a port."""
    return download_tiny(find_port("ovi"), tmp_path_factory.mktemp("tiny") / "ovi").directory


@pytest.fixture
def run(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Run a command with ``--json``; return its exit code, its envelope and the output on stderr."""
    monkeypatch.setenv("PORT_KIT_CACHE", str(tmp_path_factory.getbasetemp() / "target_cache"))

    def start(*words: object) -> tuple[int, Any, str]:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words), "--json"])
        stdout, stderr = capfd.readouterr()
        return int(ended.value.code or 0), json.loads(stdout) if stdout else None, stderr

    return start


VOCODER = ("--port", "ovi", "--component", "vocoder")


def test_coverage_of_a_tiny_component(run: Run, tiny: Path) -> None:
    for source in (tiny / "vocoder", tiny / "vocoder" / "model.safetensors"):
        code, envelope, _ = run("coverage", "--source", source, *VOCODER)
        assert code == 0 and envelope["data"]["target"]["config"] == str(tiny / "vocoder" / "config.json")


def test_coverage_of_one_of_several_models_in_a_torch_checkpoint(run: Run, tiny: Path, tmp_path: Path) -> None:
    """The other model lacks a tensor, so the keys decide about the result."""
    whole = load_file(tiny / "vocoder" / "model.safetensors")
    path = tmp_path / "vocoder" / "model.pt"
    path.parent.mkdir()
    shutil.copy(tiny / "vocoder" / "config.json", path.parent)
    lost = next(iter(whole))
    rest = {name: tensor for name, tensor in whole.items() if name != lost}
    torch.save({"generator": {"ema": whole, "raw": rest}}, path)
    code, envelope, _ = run("coverage", "--source", path, *VOCODER, "--wrapper", "generator.ema")
    assert code == 0 and envelope["data"]["target"]["config"] == str(path.parent / "config.json")
    code, envelope, _ = run("coverage", "--source", path, *VOCODER, "--wrapper", "generator.raw")
    assert code == 1 and envelope["data"]["ok"] is False
    code, envelope, _ = run("coverage", "--source", path, *VOCODER)
    assert code == 1 and envelope["error"]["code"] == "pickle_wrapper"


def test_coverage_of_a_tiny_model_directory(run: Run, tiny: Path) -> None:
    code, envelope, _ = run("coverage", "--source", tiny, "--port", "ovi")
    assert code == 0 and set(envelope["data"]["components"]) == {part.name for part in find_port("ovi").components}


def test_coverage_of_a_tiny_component_on_the_hub(run: Run, tiny: Path) -> None:
    """In a process of its own: huggingface_hub reads ``HF_ENDPOINT`` when it is imported."""
    run("manifest", tiny / "vocoder", *VOCODER)  # its target is cached
    files = {f"parts/{path.name}": path for path in (tiny / "vocoder").iterdir()}
    with Hub({"org/tiny": files}) as hub:
        command = [sys.executable, "-m", "port_kit", "coverage", "--source", "org/tiny:parts", *VOCODER, "--json"]
        done = subprocess.run(
            command, env={**os.environ, **hub.environment}, capture_output=True, text=True, timeout=300, check=False
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"]["target"]["config"] == "org/tiny:parts/config.json"


def test_full_size_on_request_does_not_fit(run: Run, tiny: Path) -> None:
    code, envelope, _ = run("coverage", "--source", tiny / "vocoder", *VOCODER, "--config", "full")
    assert code == 1 and envelope["data"]["target"]["config"] == "full size"


def test_a_file_of_other_keys_is_named_and_not_used(run: Run, tiny: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny / "vocoder", tmp_path / "vocoder")
    (other / "config.json").write_text('{"sampling_rate": 16000}')
    code, envelope, stderr = run("coverage", "--source", other, *VOCODER)
    assert code == 1 and envelope["data"]["target"]["config"] == "full size"
    assert f"note: {other / 'config.json'} is not a configuration of the port's vocoder" in stderr
    code, envelope, _ = run("coverage", "--source", other, *VOCODER, "--config", other)
    assert code == 1 and envelope["error"]["code"] == "component_config"
    code, envelope, _ = run("coverage", "--source", other, *VOCODER, "--config", tiny)
    assert code == 0


def test_a_value_that_cannot_be_built_is_an_error(run: Run, tiny: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny / "vocoder", tmp_path / "vocoder")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "upsample_rates": "many"}))
    code, envelope, _ = run("coverage", "--source", other, *VOCODER)
    assert code == 1 and envelope["error"]["code"] == "component_config"


def test_the_manifest_of_tiny_modules(run: Run, tiny: Path) -> None:
    by_source = run("manifest", tiny / "vocoder", *VOCODER)[1]["data"]
    by_option = run("manifest", *VOCODER, "--config", tiny)[1]["data"]
    full = run("manifest", *VOCODER)[1]["data"]
    assert by_source["manifest"] == by_option["manifest"] and by_source["tensors"] == full["tensors"]
    assert by_source["bytes"] < full["bytes"]


def test_rules_and_inspection_use_it(run: Run, tiny: Path) -> None:
    code, _, _ = run("rules", "check", "--source", tiny / "vocoder", *VOCODER)
    assert code == 0
    evidence = run("inspect", tiny)[1]["data"]["evidence"]
    assert any(
        item["file"] == "vocoder/config.json" and "upsample_initial_channel" in item["fact"] for item in evidence
    )


@pytest.mark.parametrize(
    "words", [("manifest", ".", "--port", "ovi"), ("manifest", ".", "--config", "full"), ("manifest", "--config", ".")]
)
def test_usage_errors(run: Run, words: tuple[str, ...]) -> None:
    assert run(*words)[0] == 2
