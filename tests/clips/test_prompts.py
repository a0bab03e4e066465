"""Files of prompts: names, types and references of each line, and what is refused with its number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from port_kit.clips import option_types, read_prompts
from port_kit.models.dreamid_omni import PORT as DREAMID
from port_kit.models.mova import PORT as MOVA
from port_kit.models.ovi import PORT as OVI
from port_kit.port import Port
from tests.helpers import raises


def write(folder: Path, *lines: str) -> Path:
    """Write a file of prompts."""
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def read(path: Path, port: Port = OVI, **defaults: Any) -> list[tuple[int, dict[str, Any], dict[str, list[Path]]]]:
    """Read a file whose lines have no other defaults."""
    lines = read_prompts(path, port, defaults, {})
    return [(line.number, dict(line.request), {k: list(v) for k, v in line.references.items()}) for line in lines]


def test_lines_have_their_numbers_options_and_references(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    lines = (
        '\ufeff{"prompt": "rain", "seed": 5}',
        "",
        '{"prompt": "\u96e8", "shift": 3, "image": "a.png"}',
        '{"prompt": "wind", "segments": 3}\r',
        '{"prompt": "sun", "continue_from": "a.png"}',
        "",
    )
    assert read(write(tmp_path, *lines), seed=1) == [
        (1, {"prompt": "rain", "seed": 5}, {}),
        (3, {"prompt": "雨", "shift": 3, "seed": 1}, {"image": [tmp_path / "a.png"]}),
        (4, {"prompt": "wind", "segments": 3, "seed": 1}, {}),
        (5, {"prompt": "sun", "seed": 1}, {"continue_from": [tmp_path / "a.png"]}),
    ]


def test_references_have_the_names_of_the_command_line(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "a.wav", "b.wav"):
        (tmp_path / name).touch()
    line = '{"prompt": "talk", "images": ["a.png", "b.png"], "voices": ["a.wav", "b.wav"]}'
    ((_, _, references),) = read(write(tmp_path, line), DREAMID)
    assert [path.name for path in references["image"] + references["audio"]] == ["a.png", "b.png", "a.wav", "b.wav"]


def test_loras_have_paths_and_scales(tmp_path: Path) -> None:
    for name in ("a.safetensors", "peft/adapter_model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    one = '{"prompt": "rain", "lora": "a.safetensors", "lora_scale": 0.5}'
    two = '{"prompt": "wind", "lora": ["a.safetensors", "peft"], "lora_scale": [1, -0.5]}'
    assert read(write(tmp_path, one, two, '{"prompt": "sun", "lora": "peft"}')) == [
        (1, {"prompt": "rain", "lora_scale": [0.5]}, {"lora": [tmp_path / "a.safetensors"]}),
        (2, {"prompt": "wind", "lora_scale": [1, -0.5]}, {"lora": [tmp_path / "a.safetensors", tmp_path / "peft"]}),
        (3, {"prompt": "sun"}, {"lora": [tmp_path / "peft"]}),
    ]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('{"prompt": "rain", "lora_scale": 0.5}', "0 LoRAs and 1 values of lora_scale"),
        ('{"prompt": "rain", "lora": "none.safetensors"}', "lora is 'none.safetensors'; expected the path"),
        ('{"prompt": "rain", "lora_scale": ["1"]}', "lora_scale is '1'; expected float"),
        ('{"promt": "rain"}', "did you mean 'prompt'?"),
        ('{"prompt": "rain", "sedd": 1}', "did you mean 'seed'?"),
        ('{"prompt": "rain", "voices": "a.wav"}', "unknown option 'voices'"),
        ('{"prompt": "rain", "model": "other"}', "unknown option 'model'"),
        ('{"prompt": "rain", "seed": "1"}', "seed is '1'; expected int"),
        ('{"prompt": "rain", "seed": true}', "expected int"),
        ('{"prompt": "rain", "shift": null}', "expected float"),
        ('{"prompt": "rain", "image": "none.png"}', "none.png"),
        ('{"prompt": "rain", "image": 3}', "image is 3"),
        ('{"prompt": "rain", "segments": 0}', "segments is 0"),
        ('{"prompt": "rain", "segments": 2, "num_outputs": 2}', "num_outputs is 2"),
        ('{"prompt": "rain", "prompt": "wind"}', "occurs twice"),
        ('{"prompt": "  "}', "no prompt"),
        ('{"seed": 1}', "no prompt"),
        ('["rain"]', "list; expected a JSON object"),
        ('{"prompt": "rain"', "no JSON"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(line: str, wanted: str, tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "good"}', "", line)
    with raises("prompts_file", str(path), "line 3: ", wanted) as caught:
        read(path)
    assert len(caught.value.details["problems"]) == 1  # type: ignore[arg-type]


def test_all_bad_lines_are_listed(tmp_path: Path) -> None:
    with raises("prompts_file", "line 1: ", "line 3: "):
        read(write(tmp_path, "rain", '{"prompt": "good"}', "wind"))


def test_a_file_without_requests_or_without_text_is_refused(tmp_path: Path) -> None:
    with raises("prompts_file", "no line"):
        read(write(tmp_path, "", " "))
    with raises("source_missing", "none.jsonl"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "prompts.jsonl").write_bytes(b"\xff\xfe")
    with raises("source_missing", "prompts.jsonl"):
        read(tmp_path / "prompts.jsonl")


@pytest.mark.parametrize("field", ['"segments": 2', '"continue_from": "a.mp4"'])
def test_a_port_without_a_first_frame_continues_nothing(field: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    with raises("prompts_file", "dreamid_omni takes none"):
        read(write(tmp_path, f'{{"prompt": "talk", {field}}}'), DREAMID)


@pytest.mark.parametrize("port", [OVI, MOVA], ids=lambda port: port.name)
def test_an_image_and_a_clip_are_two_first_frames(port: Port, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    line = '{"prompt": "rain", "continue_from": "a.mp4", "segments": 2'
    ((_, request, references),) = read(write(tmp_path, line + "}"), port)
    assert request["segments"] == 2 and list(references) == ["continue_from"]
    with raises("prompts_file", "both give the first frame"):
        read(write(tmp_path, line + ', "image": "a.mp4"}'), port)


def test_options_are_those_of_the_port() -> None:
    assert option_types(OVI)["video_guidance_scale"] is float and option_types(OVI)["segments"] is int
    assert "video_guidance_scale" not in option_types(DREAMID)
