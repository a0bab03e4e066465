"""What ``port-kit generate`` plans before an engine starts: requests, repeated clips, files of prompts, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from port_kit.cli.clip_jobs import Job, plan_jobs
from port_kit.cli.generate import parse_options, run
from port_kit.cli.make_clips import build_request, generate_clip
from port_kit.clips import attach_settings
from port_kit.models.dreamid_omni import PORT as DREAMID
from port_kit.models.mova import PORT as MOVA
from port_kit.models.ovi import PORT as OVI
from port_kit.pipeline.media import write_mp4
from port_kit.port import HostedPort, Port
from port_kit.runtime.lora_sets import read_set
from tests.helpers import raises
from tests.project.test_commands import ROOT, commands


def plan(words: str, port: Port = OVI, **options: Any) -> list[Job]:
    """Return the jobs of a command."""
    return plan_jobs(port, parse_options(port, ["--model", "none/tiny", *words.split()]), **options)


def make(job: Job, port: Port = OVI) -> None:
    """Write the files of a job, with frames of their own."""
    for path, settings in job.files(port):
        write_mp4(path, np.zeros((2, 32, 32, 3), np.uint8), fps=24)
        attach_settings(path, settings)


def test_a_request_has_what_was_given_and_its_seed(tmp_path: Path) -> None:
    image = tmp_path / "secret" / "first.png"
    image.parent.mkdir()
    Image.new("RGB", (8, 8)).save(image)
    (job,) = plan(f"--tiny --slg-layer 0 --video-guidance-scale 5 --image {image} --enforce-eager")
    assert job.request == {
        "seed": 103,
        "num_outputs": 1,
        "num_inference_steps": 4,
        "slg_layer": 0,
        "video_guidance_scale": 5.0,
        "prompt": OVI.example_prompt,
    }
    assert job.media == {"image": [str(image)]} and job.path == Path("ovi.mp4")
    assert job.settings.engine == {"dtype": "bfloat16", "enforce_eager": True}
    assert (job.settings.model["name"], job.settings.references["image"][0].name) == ("tiny", "first.png")
    assert {"port-kit", "vllm-omni", "torch"} <= job.settings.versions.keys()
    assert "secret" not in json.dumps(job.settings.to_json()), "the path is left out"


def test_a_clip_is_repeated_with_its_request_and_its_engine(tmp_path: Path) -> None:
    (job,) = plan(f"--prompt rain --seed 5 --shift 3 --dtype float32 --enforce-eager -o {tmp_path / 'a.mp4'}")
    make(job)
    (again,) = plan(f"--from-clip {job.path} -o b.mp4")
    assert again.settings.makes_same(job.settings) and again.path == Path("b.mp4")
    (other,) = plan(f"--from-clip {job.path} --seed 6 --dtype bfloat16")
    assert other.request == {**job.request, "seed": 6} and other.settings.engine["dtype"] == "bfloat16"
    with raises("clip_settings", "made by ovi", "dreamid_omni"):
        plan(f"--from-clip {job.path}", DREAMID)


def test_a_reference_is_named_and_required(tmp_path: Path) -> None:
    image, other = tmp_path / "first.png", tmp_path / "other.png"
    for path, color in ((image, "red"), (other, "blue")):
        Image.new("RGB", (8, 8), color).save(path)
    (job,) = plan(f"--image {image} -o {tmp_path / 'a.mp4'}")
    make(job)
    with raises("input_missing", "first.png") as caught:
        plan(f"--from-clip {job.path}")
    assert caught.value.hint == "add --images first.png"
    notes: list[str] = []
    plan(f"--from-clip {job.path} --image {image}", note=notes.append)
    assert not notes
    plan(f"--from-clip {job.path} --image {other}", note=notes.append)
    assert len(notes) == 1 and "other.png differs from first.png" in notes[0]
    (continued,) = plan(f"--from-clip {job.path} --continue-from {job.path}")
    assert continued.continue_from == job.path and not continued.media


def lora(file: Path, rank: int = 2) -> Path:
    """Write a LoRA that has the form of one."""
    matrices = {"A": torch.full((rank, 8), 0.5), "B": torch.ones(8, rank)}
    save_file({f"blocks.0.self_attn.q.lora_{name}.weight": matrix for name, matrix in matrices.items()}, file)
    return file


def test_loras_are_sent_in_their_order_with_their_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT_KIT_CACHE", str(tmp_path / "cache"))
    one, two = lora(tmp_path / "one.safetensors"), lora(tmp_path / "two.safetensors", rank=3)

    def sent(words: str) -> Any:
        (job,) = plan(f"--prompt rain {words}")
        return build_request(OVI, job.request, job.media, job.loras)[1]

    alone = sent(f"--lora {one} --lora-scale 0.5")
    assert (alone.lora_request.lora_path, alone.lora_request.lora_name, alone.lora_scale) == (str(one), "one", 0.5)
    for words in (
        f"--lora {one} --lora {two} --lora-scale 0.5 --lora-scale -1",
        f"--lora {one} {two} --lora-scale 0.5 -1",
    ):
        both = sent(words)
        assert read_set(Path(both.lora_request.lora_path)) == [(one, 0.5), (two, -1.0)] and both.lora_scale == 1
    assert read_set(Path(sent(f"--lora {one} {two}").lora_request.lora_path)) == [(one, 1.0), (two, 1.0)]
    assert sent("").lora_request is None and sent("").extra_args == {}


LORA_COMMANDS = [
    pytest.param(port, words, id=" ".join(words[1:2] + words[-4:]))
    for port in (OVI, DREAMID, MOVA)
    for words in commands(ROOT / "examples" / "offline_inference" / port.name / "README.md")
    if "--lora" in words
]


@pytest.mark.parametrize(("port", "words"), LORA_COMMANDS)
def test_commands_of_the_pages_apply_loras(
    port: Port, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(LORA_COMMANDS) == 6 and words[:2] == ["python", f"generate_{port.name}.py"]
    monkeypatch.setenv("PORT_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("anna.png", "ben.jpg", "anna.wav", "ben.mp3", "first_frame.png"):
        Path(name).touch()
    Path("motion_peft").mkdir()
    files = [str(lora(Path(name))) for name in ("style.safetensors", "motion_peft/adapter_model.safetensors")]
    Path("motion_peft/adapter_config.json").write_text('{"lora_alpha": 4}')
    (job,) = plan_jobs(port, parse_options(port, words[2:]))
    scales = [0.8, 0.5][: len(job.loras)]
    assert job.loras == ("style.safetensors", "motion_peft")[: len(scales)] and job.request["lora_scale"] == scales
    sampling = build_request(port, job.request, job.media, job.loras)[1]
    if len(scales) == 1:
        assert (sampling.lora_request.lora_path, sampling.lora_scale) == (str(tmp_path / files[0]), 0.8)
    else:
        paths = [tmp_path / name for name in job.loras]
        assert read_set(Path(sampling.lora_request.lora_path)) == list(zip(paths, scales, strict=True))


def test_a_clip_names_its_loras(tmp_path: Path) -> None:
    one, two = lora(tmp_path / "one.safetensors"), lora(tmp_path / "two.safetensors", rank=3)
    (job,) = plan(f"--lora {one} {two} --lora-scale 0.5 1 -o {tmp_path / 'a.mp4'}")
    make(job)
    assert job.request["lora_scale"] == [0.5, 1.0] and not job.media
    with raises("input_missing", "lora one.safetensors, two.safetensors") as caught:
        plan(f"--from-clip {job.path}")
    assert caught.value.hint == "add --lora one.safetensors two.safetensors"
    (again,) = plan(f"--from-clip {job.path} --lora {one} {two}")
    assert again.settings.makes_same(job.settings) and again.loras == (str(one), str(two))
    notes: list[str] = []
    plan(f"--from-clip {job.path} --lora {two} {one}", note=notes.append)
    assert len(notes) == 2 and "two.safetensors differs from one.safetensors" in notes[0]


def test_references_that_a_script_drew_are_drawn_again(tmp_path: Path) -> None:
    drawn = {"image": lambda: [Image.new("RGB", (8, 8))], "audio": lambda: [(np.zeros(99), 16_000)]}
    (job,) = plan(f"-o {tmp_path / 'a.mp4'}", DREAMID, default_media=drawn)
    make(job, DREAMID)
    (again,) = plan(f"--from-clip {job.path}", DREAMID, default_media=drawn)
    assert again.settings.makes_same(job.settings)
    with raises("input_missing", "a script drew"):
        plan(f"--from-clip {job.path}", DREAMID)


def test_each_output_is_repeated_alone() -> None:
    (job,) = plan("--num-outputs 2 --seed 5 -o a.mp4")
    (first, one), (second, two) = job.files(OVI)
    assert (first.name, second.name) == ("a_1.mp4", "a_2.mp4")
    assert [each.request["seed"] for each in (one, two)] == [5, 6] and two.request["num_outputs"] == 1
    hosted = HostedPort(
        name="hosted", package="hosted", title="t", class_name="C", output_type="video", denoisers=("transformer",)
    )
    shared = [each for _, each in job.files(hosted)]
    assert [(each.request["seed"], each.request["num_outputs"], each.output) for each in shared] == [
        (5, 2, 0),
        (5, 2, 1),
    ]


def test_segments_begin_with_the_last_frame_of_the_one_before(tmp_path: Path) -> None:
    start = write_mp4(tmp_path / "start.mp4", np.full((3, 32, 64, 3), 50, np.uint8), fps=24)
    (job,) = plan(f"--segments 3 --continue-from {start} --seed 5 --prompt rain")
    sent: list[tuple[int, int, int, int]] = []

    def generate(prompt: dict[str, Any], sampling: Any) -> Any:
        """Count on from the first frame, in the size that is asked for."""
        (image,) = prompt["multi_modal_data"]["image"]
        first = int(np.asarray(image)[0, 0, 0])
        sent.append((first, sampling.height, sampling.width, sampling.seed))
        frames = [np.full((sampling.height, sampling.width, 3), first + index, np.uint8) for index in range(5)]
        return SimpleNamespace(images=[np.stack(frames)], multimodal_output={"fps": 24})

    frames = generate_clip(OVI, job, generate).images[0]
    (first, *_), *_ = sent
    assert abs(first - 50) <= 2
    assert sent == [(first + 4 * index, 32, 64, 5 + index) for index in range(3)]
    assert frames[:, 0, 0, 0].tolist() == list(range(first, first + 13))


def test_finished_lines_are_those_with_the_same_settings(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    words = f"--prompts {prompts} --output-dir {tmp_path / 'clips'} --shift 3"
    prompts.write_text('{"prompt": "rain", "num_outputs": 2}\n\n{"prompt": "wind", "shift": 4}\n')
    rain, wind = plan(words)
    assert [job.path.name for job in (rain, wind)] == ["001.mp4", "003.mp4"]
    assert (rain.request["shift"], wind.request["shift"]) == (3.0, 4)
    assert not rain.is_finished(OVI) and not wind.is_finished(OVI)
    make(rain)
    make(wind)
    assert all(job.is_finished(OVI) for job in plan(words))
    prompts.write_text('{"prompt": "rain", "num_outputs": 2}\n\n{"prompt": "wind", "shift": 5}\n')
    assert [job.is_finished(OVI) for job in plan(words)] == [True, False]
    assert [job.is_finished(OVI) for job in plan(f"{words} --dtype float32")] == [False, False]
    (tmp_path / "clips" / "001_2.mp4").write_text("no clip")
    assert not plan(words)[0].is_finished(OVI)


def test_finished_lines_start_no_engine(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prompts, clips = tmp_path / "prompts.jsonl", tmp_path / "clips"
    prompts.write_text('{"prompt": "rain"}')
    options = ["--model", "none/tiny", "--prompts", str(prompts), "--output-dir", str(clips)]
    make(plan_jobs(OVI, parse_options(OVI, options))[0])
    assert run(OVI, options) == 0
    told = capfd.readouterr()
    assert "0 made, 1 finished before, 0 failed" in told.err and "starting the engine" not in told.err
    with Image.open(clips / "contact_sheet.png") as sheet:
        assert sheet.width > 960 and f"frames of all clips: {clips / 'contact_sheet.png'}" in told.out


@pytest.mark.parametrize(
    ("words", "port", "wanted"),
    [
        ("--segments 3", DREAMID, "[input_value]: segments needs a port that takes a first frame"),
        ("--continue-from {}", DREAMID, "[input_value]: continue_from needs a port that takes a first frame"),
        ("--segments 0", OVI, "[input_value]: segments is 0"),
        ("--segments 2 --num-outputs 2", OVI, "[input_count]: num_outputs is 2"),
        ("--continue-from {} --image {}", OVI, "[input_count]: continue_from and image"),
        ("--continue-from none.mp4", OVI, "[source_missing]: the reference none.mp4"),
        ("--from-clip {}", OVI, "[clip_settings]: "),
        ("--lora none.safetensors", OVI, "[source_missing]: the LoRA none.safetensors does not exist"),
        ("--lora {}", OVI, "[lora_file]: LoRA "),
        ("--lora-scale 0.5", OVI, "[input_count]: 0 LoRAs and 1 values of lora_scale"),
        ("--lora a b --lora-scale 0.5", OVI, "[input_count]: 2 LoRAs and 1 values of lora_scale"),
        ("--lora a --lora-scale nan", OVI, "[input_value]: lora_scale is nan"),
        ("--lora 1 2 3 4 5 6 7 8 9", OVI, "[input_count]: 9 LoRAs; at most 8"),
        ("-o clip.avi", OVI, "[media_write]: clip.avi: the output needs the suffix .mp4"),
    ],
)
def test_a_refusal_comes_before_the_engine(
    words: str, port: Port, wanted: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    clip = write_mp4(tmp_path / "a.mp4", np.zeros((2, 32, 32, 3), np.uint8), fps=24)
    assert run(port, ["--model", "none/tiny", *words.format(clip, clip).split()]) == 1
    told = capfd.readouterr()
    assert told.err.startswith(f"error {wanted}") and not told.out


@pytest.mark.parametrize("words", ["--prompts a.jsonl", "--output-dir d", "--prompts a --output-dir d -o x.mp4"])
def test_options_that_exclude_each_other_are_wrong_usage(words: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(OVI, ["--model", "none/tiny", *words.split()])
    assert "--output" in capfd.readouterr().err


def test_a_port_of_pictures_has_no_options_of_videos(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_options(dataclasses.replace(OVI, output_type="image"), ["--model", "m", "--segments", "2"])
    assert "--segments" in capfd.readouterr().err
