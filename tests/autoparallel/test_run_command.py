"""``port-kit run``: usage, the server's command, and an image from a tiny pipeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from port_kit.autoparallel.host.checks import PLAN_KEY
from port_kit.autoparallel.shipped import shipped_plan
from port_kit.autoparallel.tiny_pipelines import CASES, write_pipeline
from port_kit.cli.run import _request, command, serve_command
from port_kit.clips import read_settings
from port_kit.parallel.layout import ULYSSES_MODES, Layout


def test_an_unknown_option_is_a_usage_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tmp_path), "--tensor-paralel-size", "2"])
    assert result.exit_code == 2
    assert "--tensor-paralel-size" in result.output


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tmp_path)])
    assert result.exit_code == 1
    assert "model_incomplete" in result.output


def test_the_server_gets_the_layout_and_the_plan() -> None:
    given = {"dtype": "float32", "enforce_eager": True, "cache_backend": "cache_dit", "cache_config": '{"a": 1}'}
    found = serve_command("dir", "PortKitImagePipeline", {PLAN_KEY: "p.toml"}, Layout(tp=2, cfg=2), given)
    options = dict(zip(found, found[1:], strict=False))
    assert options["--model-class-name"] == "PortKitImagePipeline"
    assert (options["--tensor-parallel-size"], options["--cfg-parallel-size"]) == ("2", "2")
    assert json.loads(options["--additional-config"]) == {PLAN_KEY: "p.toml"}
    assert (options["--cache-backend"], json.loads(options["--cache-config"])) == ("cache_dit", {"a": 1})
    assert "--enforce-eager" in found


@pytest.mark.parametrize("mode", [None, *ULYSSES_MODES])
def test_the_plan_must_prove_the_mode_of_ulysses(
    mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pipeline("FluxPipeline", CASES["FluxPipeline"], tmp_path / "model")
    served: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, arguments: served.append(arguments))
    options = ["--ulysses-degree", "2", *(["--ulysses-mode", mode] if mode else [])]
    plan = shipped_plan("FluxTransformer2DModel")
    result = CliRunner().invoke(command, [str(folder), "--serve", *options, "--plan", str(plan)])
    if mode == "advanced_uaa":
        assert result.exit_code == 1 and not served
        assert "plan_layout" in result.output and "ulysses2-uaa" in result.output
    else:
        assert "--ulysses-degree" in served[0] and "--ulysses-mode" not in served[0]


def test_the_server_gets_the_mode_of_ulysses() -> None:
    given = {"dtype": "float32", "enforce_eager": False, "cache_backend": None, "cache_config": None}
    found = serve_command("dir", "PortKitImagePipeline", {}, Layout(ulysses=2, uaa=True), given)
    options = dict(zip(found, found[1:], strict=False))
    assert (options["--ulysses-degree"], options["--ulysses-mode"]) == ("2", "advanced_uaa")


def test_a_mode_without_ulysses_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tmp_path), "--ulysses-mode", "advanced_uaa"])
    assert result.exit_code == 1
    assert "parallel_degree" in result.output and "ulysses" in result.output


@pytest.mark.parametrize(
    "options", [["--cache-config", "{}"], ["--cache-backend", "cache_dit", "--cache-config", "0.1"]]
)
def test_settings_without_a_cache_are_refused(options: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tmp_path), *options])
    assert result.exit_code == 1
    assert "input_value" in result.output


def test_a_seed_that_is_not_given_is_drawn() -> None:
    given = {name: None for name in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")}
    given |= {"true_cfg_scale": None, "fps": None, "seed": None, "num_outputs": None, "negative_prompt": None}
    given |= {"prompt": "", "image": None, "arguments": ()}
    seeds = {_request(given)[1].seed for _ in range(4)}
    assert len(seeds) > 1 and all(0 <= seed < 2**31 for seed in seeds)
    assert _request({**given, "seed": 7})[1].seed == 7


@pytest.mark.slow
@pytest.mark.integration
def test_an_image_is_written(tmp_path: Path) -> None:
    folder = write_pipeline("FluxPipeline", CASES["FluxPipeline"], tmp_path / "model")
    options = ["--prompt", "a red cat", "--height", "32", "--width", "32", "--num-inference-steps", "2"]
    options += ["--seed", "1", "--dtype", "float32", "--enforce-eager", "--argument", "max_sequence_length=16"]
    done = subprocess.run(
        [sys.executable, "-m", "port_kit", "run", str(folder), *options, "-o", str(tmp_path / "cat.png")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"{tmp_path / 'cat.png'}\n"
    assert "seed 1\n" in done.stderr
    pixels = np.asarray(Image.open(tmp_path / "cat.png"))
    assert pixels.shape == (32, 32, 3) and pixels.std() > 5
    settings = read_settings(tmp_path / "cat.png")
    steps = {"prompt": "a red cat", "height": 32, "width": 32, "num_inference_steps": 2}
    assert settings.request == {**steps, "seed": 1, "max_sequence_length": 16}
    assert (settings.port, settings.model) == ("", {"name": "model"})
