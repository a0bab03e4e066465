"""Ovi's example scripts: the tiny download, a first frame through vLLM-Omni's own engine, options by their names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from port_kit.cli.clip_jobs import plan_jobs
from port_kit.cli.generate import PARALLEL_DEGREES, build_parser, engine_options, run
from port_kit.cli.make_clips import build_request
from port_kit.models.ovi import PORT
from tests.models.test_admission import write_lora

EXAMPLE = Path(__file__).parents[2] / "examples" / "offline_inference" / "ovi"


def script(name: str, *options: str) -> str:
    """Run one of the example's scripts and return its output."""
    environment = {**os.environ, "NO_PROXY": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE / name), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not re.search(r"\b(DEBUG|INFO|WARNING)\b", done.stderr), "logs without --verbose"
    return done.stdout


@pytest.mark.slow
def test_the_tiny_model_makes_a_video_with_audio_from_a_first_frame(tmp_path: Path) -> None:
    model = tmp_path / "ovi"
    assert "ovi is complete: 8 files" in script("download_ovi.py", "--tiny", "--output-dir", str(model))
    index = json.loads((model / "model_index.json").read_text())
    assert (index["_class_name"], index["variant"], index["video_latent_length"]) == (PORT.class_name, "720x720_5s", 31)
    Image.new("RGB", (130, 50), (90, 120, 60)).save(tmp_path / "first.png")
    options = ["--tiny", "--enforce-eager", "--num-inference-steps", "2", "--image", str(tmp_path / "first.png")]
    loras = [write_lora(tmp_path / f"{name}.safetensors", model, seed=seed) for seed, name in enumerate("ab")]
    options += ["--lora", *map(str, loras), "--lora-scale", "0.8", "0.5"]
    told = script("generate_ovi.py", "--model", str(model), *options, "--output", str(tmp_path / "out.mp4"))
    assert "out.mp4: 121 frames 128x64 at 24 fps (h264, 5.04 s), audio at 16000 Hz" in told
    assert f", seed {PORT.seed}, " in told


@pytest.mark.slow
def test_three_prompts_make_the_clips_that_they_describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE.parents[2])  # benchmarks are not part of the package
    from benchmarks.tiny_world.scores import measure

    model, prompts = tmp_path / "tiny", EXAMPLE / "tiny_prompts.jsonl"
    script("download_ovi.py", "--tiny", "--trained", "--output-dir", str(model))
    options = ["--tiny", "--enforce-eager", "--height", "64", "--width", "96", "--num-inference-steps", "25"]
    options += ["--prompts", str(prompts), "--output-dir", str(tmp_path / "clips")]
    script("generate_ovi.py", "--model", str(model), *options)
    for number, line in enumerate(prompts.read_text(encoding="utf-8").splitlines(), start=1):
        (found,) = measure(*read_clip(tmp_path / "clips" / f"{number:03}.mp4"))
        prompt = json.loads(line)["prompt"]
        words = (found.colour, found.shape, found.tempo, found.direction, found.pitch)
        assert all(word in prompt for word in words), (prompt, words)


def read_clip(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels ``[1, 3, F, H, W]`` in [-1, 1] and samples ``[1, S]``."""
    with av.open(str(path)) as file:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    with av.open(str(path)) as file:
        sound = [torch.from_numpy(frame.to_ndarray()) for frame in file.decode(audio=0)]
    pixels = torch.stack(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return pixels, torch.cat(sound, 1)[:1].float()


def test_engine_options_keep_vllm_omnis_names() -> None:
    words = "--model M --cfg-parallel-size 2 --ulysses-degree 2 --use-hsdp --enforce-eager"
    options = engine_options(build_parser(PORT).parse_args(words.split()))
    degrees = {name: options.pop(name) for name in PARALLEL_DEGREES}
    assert (degrees["cfg_parallel_size"], degrees["ulysses_degree"], options.pop("use_hsdp")) == (2, 2, True)
    assert options == {"model": "M", "dtype": "bfloat16", "enforce_eager": True}


def test_a_request_says_only_what_was_given(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    words = f"--model M --tiny --slg-layer 0 --video-guidance-scale 5 --image {tmp_path / 'a.png'}"
    (job,) = plan_jobs(PORT, build_parser(PORT).parse_args(words.split()))
    prompt, sampling = build_request(PORT, job.request, job.media)
    assert (sampling.height, sampling.width, sampling.num_inference_steps, sampling.seed) == (None, None, 4, 103)
    assert sampling.extra_args == {"slg_layer": 0, "video_guidance_scale": 5.0}
    assert prompt["multi_modal_data"] == {"image": [str(tmp_path / "a.png")]}


def test_a_damaged_index_is_named_before_an_engine_starts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "Ovi')
    assert run(PORT, ["--model", str(tmp_path), "--tiny", "--output", str(tmp_path / "out.mp4")]) == 1
    told = capfd.readouterr().err
    assert "error [model_incomplete]: cannot read" in told and str(tmp_path / "model_index.json") in told
    assert "starting the engine" not in told
