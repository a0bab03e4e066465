"""Settings in MP4, WAV and PNG files: what they hold, that they change nothing else, and files without them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from port_kit.cli import main
from port_kit.clips import ClipSettings, Reference, attach_settings, describe_model, read_settings
from port_kit.download.lock import Lock
from port_kit.pipeline.media import write_mp4, write_wav
from tests.helpers import raises

SETTINGS = ClipSettings(
    port="ovi",
    model={"name": "tiny", "content": "ab" * 32},
    request={"prompt": 'rain \u2602 on "a" roof\n', "seed": 7, "guidance_scale": 2.5, "num_outputs": 1},
    references={"image": (Reference("first.png", "cd" * 32), Reference())},
    engine={"dtype": "float32"},
    versions={"port-kit": "1.0"},
)
RATE = 16_000


def video(path: Path, *, sound: bool) -> Path:
    """Write 13 frames of noise, with or without sound."""
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 255, (13, 32, 48, 3), dtype=np.uint8)
    samples = generator.uniform(-0.5, 0.5, RATE // 2).astype(np.float32) if sound else None
    return write_mp4(path, frames, samples, fps=24, sample_rate=RATE)


def decoded(path: Path) -> list[np.ndarray]:
    """Return the arrays of all frames of all streams."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray() for frame in container.decode(*container.streams)]


@pytest.mark.parametrize("sound", [True, False])
def test_a_video_keeps_its_frames_and_its_sound(sound: bool, tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", sound=sound)
    before = decoded(path)
    attach_settings(path, SETTINGS)
    after = decoded(path)
    assert len(before) == len(after) and all(map(np.array_equal, before, after))
    assert read_settings(path) == SETTINGS
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_a_sound_and_a_picture_keep_their_content(tmp_path: Path) -> None:
    sound = write_wav(tmp_path / "a.wav", np.linspace(-1, 1, 999, dtype=np.float32), sample_rate=RATE)
    samples = decoded(sound)
    picture = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    for path in (sound, picture):
        attach_settings(path, SETTINGS)
        assert read_settings(path) == SETTINGS
    assert np.array_equal(np.concatenate(decoded(sound), 1), np.concatenate(samples, 1))
    assert np.array_equal(np.asarray(Image.open(picture)), pixels)


@pytest.mark.parametrize("name", ["a.mp4", "a.wav", "a.png"])
def test_a_file_without_settings_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".mp4":
        video(path, sound=False)
    elif path.suffix == ".wav":
        write_wav(path, np.zeros(99, np.float32), sample_rate=RATE)
    else:
        Image.new("RGB", (8, 8)).save(path)
    with raises("clip_settings", name, "no settings"):
        read_settings(path)
    done = CliRunner().invoke(main, ["show", str(path), "--json"])
    assert (done.exit_code, json.loads(done.stdout)["error"]["code"]) == (1, "clip_settings")


def test_settings_of_another_form_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    attach_settings(path, dataclasses.replace(SETTINGS, request=[1]))  # type: ignore[arg-type]
    with raises("clip_settings", "cannot be read"):
        read_settings(path)


def test_files_that_are_missing_or_no_media_are_named(tmp_path: Path) -> None:
    with raises("source_missing", "a.mp4"):
        read_settings(tmp_path / "a.mp4")
    for name in ("a.mp4", "a.png"):
        (tmp_path / name).write_text("no")
        with raises("media_write", name):
            read_settings(tmp_path / name)


def test_show_prints_the_settings(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", sound=True)
    attach_settings(path, SETTINGS)
    done = CliRunner().invoke(main, ["show", str(path), "--json"])
    assert json.loads(done.stdout)["data"] == SETTINGS.to_json()
    text = CliRunner().invoke(main, ["show", str(path)]).stdout
    assert "first.png" in text and "--from-clip" in text and "2.5" in text


def test_settings_are_the_same_but_for_versions() -> None:
    assert SETTINGS.makes_same(dataclasses.replace(SETTINGS, versions={}))
    assert not SETTINGS.makes_same(dataclasses.replace(SETTINGS, engine={}))
    assert not SETTINGS.makes_same(dataclasses.replace(SETTINGS, request={**SETTINGS.request, "seed": 8}))


def test_a_reference_is_its_name_and_content_without_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "first.png"
    path.write_bytes(b"pixels")
    assert Reference.of(str(path)) == Reference("first.png", hashlib.sha256(b"pixels").hexdigest())
    assert Reference.of(Image.new("RGB", (8, 8))) == Reference()
    with raises("source_missing", "none.png"):
        Reference.of(tmp_path / "none.png")


def test_a_model_directory_is_known_by_its_locked_content(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    assert describe_model(model) == {"name": "tiny"}
    found = []
    for content in ("aa", "bb"):
        written = {"config.json": {"size": 2, "sha256": content, "adopted": False}}
        Lock("ovi", "f", {}, written=written, complete=True).save(model)
        found.append(describe_model(model))
    assert found[0]["name"] == "tiny" and found[0]["content"] != found[1]["content"]
    assert describe_model(tmp_path / "moved") == {"name": "moved"}
