"""Deploy files of vLLM-Omni for ports: which options they stand for, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from port_kit.cli import main
from port_kit.cli import serve as serve_module
from port_kit.errors import ConfigError
from port_kit.serving.deploy import ENGINE, FIXED, PLACE, STAGE, engine_options
from tests.serving.helpers import EXAMPLES

STARTED = """
stages:
  - stage_id: 0
    tensor_parallel_size: 2
    use_hsdp: false
    enforce_eager: true
    cache_config: {Fn_compute_blocks: 1}
"""


def written(folder: Path, text: str) -> Path:
    """Write a deploy file."""
    path = folder / "deploy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_values_become_options(tmp_path: Path) -> None:
    options = engine_options(written(tmp_path, f"async_chunk: false\nquantization: fp8\n{STARTED}"))
    assert options == [
        *("--quantization", "fp8", "--tensor-parallel-size", "2", "--enforce-eager"),
        *("--cache-config", '{"Fn_compute_blocks": 1}'),
    ]


@pytest.mark.parametrize("port", ["ovi", "dreamid_omni", "mova"])
def test_the_examples_use_two_gpus(port: str) -> None:
    options = engine_options(EXAMPLES / port / "deploy_2gpus.yaml")
    assert options[options.index("--cfg-parallel-size") + 1] == "2"
    assert json.loads(options[options.index("--stage-overrides") + 1]) == {"0": {"devices": "0,1"}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("stages: [", "cannot read"),
        ("- stage_id: 0", "holds list"),
        ("stages: []", "not a list of one stage"),
        ("stages: [{stage_id: 0}, {stage_id: 1}]", "not a list of one stage"),
        ("stages: [{stage_id: 1}]", "stage_id is 1"),
        ("stages: [{devices: '0'}]", "stage_id is None"),
        ("async_chunk: true\nstages: [{stage_id: 0}]", "async_chunk is True; a port needs False"),
        ("pipeline: ovi\nstages: [{stage_id: 0}]", "the file has the key 'pipeline'"),
        ("stages: [{stage_id: 0, tensor_parallel: 2}]", "the stage has the key 'tensor_parallel'"),
        ("stages: [{stage_id: 0, cfg_parallel_size: '2'}]", "cfg_parallel_size is '2'; int is required"),
        ("stages: [{stage_id: 0, ring_degree: true}]", "ring_degree is True; int is required"),
        ("stages: [{stage_id: 0, use_hsdp: 1}]", "use_hsdp is 1; bool is required"),
        ("stages: [{stage_id: 0, devices: 0}]", "devices is 0; str is required"),
    ],
)
def test_what_a_port_does_not_read_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_options(written(tmp_path, text))
    assert problem in str(caught.value) and caught.value.hint
    assert "tensor_parallel_size" in caught.value.hint or "tensor_parallel:" not in text


@pytest.mark.parametrize("known", [True, False])
def test_the_command_line_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """vLLM-Omni reads the file of a pipeline of its own itself."""
    lines: list[Any] = []
    monkeypatch.setattr(serve_module.os, "execve", lambda _path, line, _environment: lines.extend(line))
    name = "OviPipeline" if known else "WanPipeline"
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    path = str(written(tmp_path, STARTED))
    given = ["serve", str(tmp_path), "--storage", str(tmp_path / "videos"), "--deploy-config", path]
    done = CliRunner().invoke(main, [*given, "--tensor-parallel-size", "4"])
    assert done.exit_code == 0, done.output
    found = [lines[place + 1] for place, word in enumerate(lines) if word == "--tensor-parallel-size"]
    assert found == (["2", "4"] if known else ["4"])
    assert ("--deploy-config" in lines) == (not known)


@pytest.mark.slow
def test_vllm_omni_has_the_keys_and_the_options() -> None:
    from vllm_omni.config.stage_config import DeployConfig, StageDeployConfig

    assert {*ENGINE, *FIXED} <= {field.name for field in fields(DeployConfig)}
    assert {*PLACE, *STAGE} <= {field.name for field in fields(StageDeployConfig)}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "--omni", "--help=all"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    for name in (*ENGINE, *STAGE):
        assert f"--{name.replace('_', '-')}" in printed, name
