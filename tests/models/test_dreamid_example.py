"""The example scripts: the tiny download makes a directory that loads; options reach the engine by their names."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from port_kit.cli.clip_jobs import plan_jobs
from port_kit.cli.generate import PARALLEL_DEGREES, build_parser, engine_options
from port_kit.cli.make_clips import build_request
from port_kit.models.dreamid_omni import PORT
from port_kit.pipeline.loading import load_pipeline
from port_kit.runtime.single_process import single_rank

EXAMPLE = Path(__file__).parents[2] / "examples" / "offline_inference" / "dreamid_omni"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The generate script as a module."""
    spec = importlib.util.spec_from_file_location("generate_dreamid_omni", EXAMPLE / "generate_dreamid_omni.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tiny_download_loads_completely(tmp_path: Path) -> None:
    script = EXAMPLE / "download_dreamid_omni.py"
    environment = {**os.environ, "NO_PROXY": "127.0.0.1,localhost"}
    command = [sys.executable, str(script), "--tiny", "--output-dir", str(tmp_path / "dreamid_omni")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "dreamid_omni is complete: 8 files" in done.stdout
    index = json.loads((tmp_path / "dreamid_omni" / "model_index.json").read_text())
    assert (index["_class_name"], index["video_latent_length"]) == (PORT.class_name, 31)
    with single_rank(torch.bfloat16):
        pipeline = load_pipeline(tmp_path / "dreamid_omni")
    dtypes = {name: {p.dtype for p in getattr(pipeline, name).parameters()} for name in ("transformer", "vae")}
    # The video VAE computes in float32 whatever the engine's dtype.
    assert dtypes == {"transformer": {torch.bfloat16}, "vae": {torch.float32}}


def test_engine_options_keep_vllm_omnis_names() -> None:
    words = "--model M --cfg-parallel-size 2 --ulysses-degree 2 --enforce-eager --cache-backend cache_dit"
    options = engine_options(build_parser(PORT).parse_args(words.split()))
    degrees = {name: options.pop(name) for name in PARALLEL_DEGREES}
    assert (degrees["cfg_parallel_size"], degrees["ulysses_degree"], options.pop("use_hsdp")) == (2, 2, False)
    assert options == {"model": "M", "dtype": "bfloat16", "enforce_eager": True, "cache_backend": "cache_dit"}


def test_a_request_says_only_what_was_given(generate: ModuleType) -> None:
    arguments = build_parser(PORT).parse_args("--model M --tiny --shift 3 --num-inference-steps 2".split())
    (job,) = plan_jobs(PORT, arguments, generate.DEFAULT_MEDIA)
    prompt, sampling = build_request(PORT, job.request, job.media)
    assert (sampling.height, sampling.width, sampling.num_inference_steps, sampling.seed) == (64, 96, 2, 100)
    assert sampling.extra_args == {"shift": 3.0}
    media = prompt["multi_modal_data"]
    assert [image.size for image in media["image"]] == [(192, 256)] * 2
    assert all(len(samples) >= 2 * rate and np.abs(samples).max() < 1 for samples, rate in media["audio"])
