"""Scores against speed: the rows and their engines, clips of an engine's output, and a run on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from port_kit.models.ovi import PORT
from port_kit.models.ovi.config import GuidanceScales
from port_kit.testing.tiny_port import tiny_model_of
from port_kit.testing.tiny_trained import read_release

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quality() -> Iterator[ModuleType]:
    """Import from the repository: benchmarks are not part of the package."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import quality

        yield quality
    finally:
        while str(ROOT) in sys.path:  # the script inserts it too
            sys.path.remove(str(ROOT))


def plan(quality: ModuleType, *options: str) -> list[list[dict[str, object]]]:
    """Return the rows of each engine that a command would start."""
    given = quality.build_parser().parse_args(["--dtype", "float32", *options])
    jobs = quality.plan(given, {True: Path("trained"), False: Path("random")}, Path("frames"))
    return [job.rows for job in jobs]


def test_rows_with_equal_engines_share_one(quality: ModuleType, tmp_path: Path) -> None:
    rows = [[row["name"] for row in engine] for engine in plan(quality, "--lora", str(tmp_path))]
    assert rows[0][0] == "exact" and rows[0][-1] == "lora" and {"10 steps", "guidance gate"} < set(rows[0])
    assert all(len(engine) == 1 for engine in rows[1:])
    assert sorted(sum(rows, [])) == sorted(quality.ROWS)
    assert "lora" not in sum(([row["name"] for row in engine] for engine in plan(quality)), [])


def test_rows_set_options_of_requests(quality: ModuleType) -> None:
    assert quality.SCALES == asdict(GuidanceScales())
    (rows,) = plan(quality, "--row", "50 steps", "--row", "guidance gate", "--row", "guidance x0.5", "--steps", "9")
    found = {row["name"]: (row["steps"], row["options"]) for row in rows}
    assert found == {
        "50 steps": (50, {}),
        "guidance gate": (9, {"guidance_gate_step": 4}),
        "guidance x0.5": (9, {"video_guidance_scale": 2.0, "audio_guidance_scale": 1.5}),
    }


def test_random_weights_have_the_form_of_the_trained_ones(quality: ModuleType, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    port = replace(PORT, trained_model="benchmarks.tiny_world.untrained:random_model")
    tiny = tiny_model_of(port, tmp_path, trained=True)
    assert tiny.model_index["video_area"] == 64 * 96
    trained, facts = read_release()
    assert tiny.configs["vae"].items() >= facts["configs"]["vae"].items()
    (values,) = (load_file(path) for path in tmp_path.rglob("*.safetensors"))
    expected = trained["transformer"]
    assert {name: value.shape for name, value in values.items()} == {n: v.shape for n, v in expected.items()}
    name = "video_model.blocks.0.self_attn.q.weight"
    assert not torch.equal(values[name].float(), expected[name].float())


def test_true_clips_keep_their_points_as_output_of_an_engine(quality: ModuleType) -> None:
    from benchmarks.tiny_world import clips, grammar, scores, served

    given, world = grammar.held_back(6), clips.World()
    scenes = world.described(given, seed=4)
    frames = ((world.pixels(scenes)[0] + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    waves = world.wave(scenes).numpy()
    made = [served.to_clip(*one, clips.RATE) for one in zip(frames, waves, strict=True)]
    pixels, wave = (torch.cat(part) for part in zip(*made, strict=True))
    assert scores.score(pixels, wave, given) == dict.fromkeys(scores.SCORES, 1.0)
    with pytest.raises(ValueError, match="expected"):
        served.to_clip(frames[0], waves[0][:-1], clips.RATE)


def test_frames_are_compared_with_kept_ones(quality: ModuleType, tmp_path: Path) -> None:
    from benchmarks.tiny_world.served import compare

    frames = torch.full((2, 3), 250, dtype=torch.uint8).numpy()
    path = tmp_path / "exact 0.npy"
    assert compare(frames, path, keep=False) == compare(frames, path, keep=True) == []
    assert compare(frames - 10, path, keep=False) == [10.0]


def test_rows_of_a_process_that_died_have_failed(
    quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    job = quality.Job({}, 1, [asdict(quality.Request("exact", 2)), asdict(quality.Request("50 steps", 50))], 1, 0, "")
    found = list(quality.serve(job, tmp_path, 60.0))
    assert [row["name"] for row in found] == ["exact", "50 steps"]
    assert all("exit code 1" in row["failed"] for row in found)


def test_a_reason_has_the_line_before_a_hint(quality: ModuleType) -> None:
    from benchmarks.tiny_world.served import reason

    assert (
        reason(RuntimeError("engine died\nno fp8 here\nhint: remove it\n"))
        == "RuntimeError: no fp8 here; hint: remove it"
    )
    assert reason(RuntimeError("engine died\nno GPU")) == "RuntimeError: no GPU"


@pytest.mark.slow
def test_clips_of_the_engine_are_scored(tmp_path: Path) -> None:
    options = ["--row", "exact", "--row", "cache_dit", "--row", "fp8", "--row", "random weights"]
    command = [sys.executable, str(ROOT / "benchmarks/quality.py"), *options, "--prompts", "1", "--warm-up", "0"]
    done = subprocess.run(
        [*command, "--steps", "8"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["exact"]["scores"]["colour"] == 1.0 and rows["exact"]["denoise_seconds"] > 0
    assert 0 <= rows["cache_dit"]["reuse"] < 1 and rows["cache_dit"]["difference"] < 30
    assert "quantization" in rows["fp8"]["failed"]
    assert rows["random weights"]["difference"] > 5
