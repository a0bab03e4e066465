"""Checkpoints of several files, formats that are not read, and tensors that are not at the top level of a pickle."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from port_kit.cli import main
from port_kit.errors import PortKitError
from port_kit.manifest import Manifest

FORMATS = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}
LEGACY = {"_use_new_zipfile_serialization": False}


def write(folder: Path, files: dict[str, dict[str, int]]) -> None:
    """Files of tensors, ``{file: {name: length}}``, in the format of their suffix."""
    for file, tensors in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {name: torch.zeros(length) for name, length in tensors.items()}
        if path.suffix == ".safetensors":
            save_file(content, path)
        else:
            torch.save(content, path)


def write_index(folder: Path, name: str, weight_map: dict[str, str]) -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return path


def found_in(manifest: Manifest) -> dict[str, tuple[str, int]]:
    """``{name: (file, length)}``"""
    return {name: (spec.file, spec.numel) for name, spec in manifest.items()}


def refused(path: Path, wrapper: str = "") -> PortKitError:
    with pytest.raises(PortKitError) as caught:
        Manifest.from_checkpoint(path, wrapper)
    assert caught.value.hint
    return caught.value


def test_flipped_bits_of_a_header_are_read_or_refused(tmp_path: Path) -> None:
    """Bits of values are not noticed here: download --verify compares files with their hashes."""
    path, refusals = tmp_path / "model.safetensors", 0
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
    data = path.read_bytes()
    for place in range(8 + struct.unpack("<Q", data[:8])[0]):
        for bit in (0, 5, 7):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            try:
                Manifest.from_checkpoint(path)
            except PortKitError as error:
                assert error.hint and error.message.replace("\n", "").isprintable() and len(error.message) < 500
                refusals += 1
    assert refusals > 200


# -- indexes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["the folder", "the index"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_an_index_decides_which_copy_counts(tmp_path: Path, suffix: str, named: str) -> None:
    one, two = f"one.{suffix}", f"sub/two.{suffix}"
    write(tmp_path, {one: {"a": 2, "x": 3, "stale": 1}, two: {"x": 4, "b": 5, "a": 9}, f"stray.{suffix}": {"c": 1}})
    index = write_index(tmp_path, FORMATS[suffix], {"a": one, "x": two, "b": two})
    manifest = Manifest.from_checkpoint(tmp_path if named == "the folder" else index)
    assert found_in(manifest) == {"a": (one, 2), "x": (two, 4), "b": (two, 5)}
    assert len(manifest.notes) == 2
    assert "stale" in manifest.notes[0] and "x" in manifest.notes[0] and "a" in manifest.notes[1]
    if suffix == "safetensors":
        assert set(manifest.places) == {"a", "x", "b"}
        content = (tmp_path / two).read_bytes()
        assert len(content) >= manifest.places["x"] + 16


@pytest.mark.parametrize("suffix", FORMATS)
def test_files_that_an_index_names_must_be_there(tmp_path: Path, suffix: str) -> None:
    files = [f"model-{number}-of-3.{suffix}" for number in (1, 2, 3)]
    write(tmp_path, {files[0]: {"a": 2}})
    write_index(tmp_path, FORMATS[suffix], {"a": files[0], "b": files[1], "c": files[2]})
    error = refused(tmp_path)
    assert error.code == "manifest_invalid" and error.details["missing"] == files[1:]
    assert files[1] in error.message and files[2] in error.message


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_tensors_that_an_index_lists_must_be_in_their_file(tmp_path: Path, suffix: str, elsewhere: bool) -> None:
    one, two = f"one.{suffix}", f"two.{suffix}"
    write(tmp_path, {one: {"a": 2}, two: {"b": 2, **({"lost": 2} if elsewhere else {})}})
    write_index(tmp_path, FORMATS[suffix], {"a": one, "lost": one, "b": two})
    error = refused(tmp_path)
    assert error.code == "manifest_invalid" and "'lost'" in error.message and one in error.message
    assert (two in error.message) == elsewhere


def test_two_indexes_are_not_chosen_from_and_an_empty_one_is_none(tmp_path: Path) -> None:
    write(tmp_path, {"one.bin": {"a": 2}})
    write_index(tmp_path, "pytorch_model.bin.index.json", {"a": "one.bin"})
    other = write_index(tmp_path, "ema.bin.index.json", {})
    assert "ema.bin.index.json" in refused(tmp_path).message
    assert refused(other).code == "manifest_invalid"


def test_safetensors_are_preferred_and_state_of_trainers_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"pytorch_model.bin": {"w": 2}, "optimizer.pt": {"step": 1}})
    manifest = Manifest.from_checkpoint(tmp_path)
    assert set(manifest) == {"w"} and "optimizer.pt" in manifest.notes[0]
    write_index(tmp_path, "pytorch_model.bin.index.json", {"w": "absent.bin"})
    write(tmp_path, {"model.safetensors": {"w": 3}})
    assert found_in(Manifest.from_checkpoint(tmp_path)) == {"w": ("model.safetensors", 3)}


def test_notes_are_printed_on_stderr(tmp_path: Path) -> None:
    write(tmp_path, {"one.safetensors": {"a": 2, "stale": 1}})
    write_index(tmp_path, "model.safetensors.index.json", {"a": "one.safetensors"})
    done = CliRunner().invoke(main, ["manifest", str(tmp_path)])
    assert done.exit_code == 0 and "stale" in done.stderr and "stale" not in done.stdout
    done = CliRunner().invoke(main, ["manifest", str(tmp_path), "--json"])
    assert "stale" in json.loads(done.stdout)["data"]["notes"][0]


# -- formats that are not read -------------------------------------------------------------------------------------


def gguf(path: Path) -> None:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))


def plain_zip(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/w.txt", "1")


FOREIGN = {
    "model.gguf": (gguf, "GGUF"),
    "gguf.safetensors": (gguf, "GGUF"),
    "gguf.bin": (gguf, "GGUF"),
    "gguf": (gguf, "GGUF"),
    "w.npz": (lambda path: np.savez(path, w=np.zeros(2)), "npz"),
    "w.npy": (lambda path: np.save(path, np.zeros(2)), "NumPy"),
    "model.h5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "HDF5"),
    "model.onnx": (lambda path: path.write_bytes(b"\x08\x09\x12\x07pytorch" + bytes(99)), "ONNX"),
    "flax_model.msgpack": (lambda path: path.write_bytes(b"\x81\xa6params" + bytes(99)), "msgpack"),
    "model.tflite": (lambda path: path.write_bytes(b"\x1c\0\0\0TFL3" + bytes(99)), "TFLite"),
    "saved_model.pb": (lambda path: path.write_bytes(b"\x08\x01" + bytes(99)), "TensorFlow"),
    "__0_0.distcp": (lambda path: torch.save({"w": torch.ones(2)}, path), "DCP"),
    "pages.zip": (plain_zip, "data.pkl"),
    "zip.pth": (plain_zip, "data.pkl"),
    "pointer.safetensors": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "LFS"),
    "page.safetensors": (lambda path: path.write_text("<!DOCTYPE html><html></html>"), "HTML"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_named(tmp_path: Path, name: str) -> None:
    make, word = FOREIGN[name]
    make(tmp_path / name)
    error = refused(tmp_path / name)
    assert error.code == "checkpoint_format" and word in error.message
    done = CliRunner().invoke(main, ["manifest", str(tmp_path / name), "--json"])
    assert done.exit_code == 1 and json.loads(done.stdout)["error"]["code"] == "checkpoint_format"
    if name != "gguf" and not name.endswith(".zip"):
        assert refused(tmp_path).code == "checkpoint_format"  # also found in its folder


def test_a_distributed_checkpoint_is_named_and_its_remedy_works(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = tmp_path / "dcp"
    dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=folder, no_dist=True)
    torch.save({"args": 1}, folder / "common.pt")
    for path in (folder, folder / ".metadata"):
        error = refused(path)
        assert error.code == "checkpoint_format" and "dcp_to_torch" in error.hint
    dcp_to_torch_save(folder, tmp_path / "model.pt")
    assert found_in(Manifest.from_checkpoint(tmp_path / "model.pt", "model")) == {"w": ("model.pt", 3)}


@pytest.mark.parametrize("name", ["weights", "weights.sft"])
def test_files_of_other_names_are_read_by_content(tmp_path: Path, name: str) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / name)
    assert set(Manifest.from_checkpoint(tmp_path / name)) == {"w"}
    torch.save({"v": torch.zeros(2)}, tmp_path / "weights.tmp")
    assert set(Manifest.from_checkpoint(tmp_path / "weights.tmp")) == {"v"}


def test_files_of_no_known_content_are_none(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "absent.pth", tmp_path / "absent.safetensors"):
        assert refused(path).code == "manifest_invalid"


# -- tensors that are not at the top level -------------------------------------------------------------------------


def tensors(*names: Any) -> dict[Any, torch.Tensor]:
    return {name: torch.ones(2) for name in names}


SHARED = tensors("w", "b")
#: content -> code, places in the message, wrappers that may be named
UNSELECTED: dict[str, tuple[Any, str, tuple[str, ...], tuple[str, ...]]] = {
    "a list": ({"decay": 0.9, "shadow": [torch.ones(2)] * 2}, "pickle_unsupported", ("shadow (2",), ()),
    "a tuple in a list": ({"shadow": [(torch.ones(2), 3)]}, "pickle_unsupported", ("shadow (1",), ()),
    "integer keys": (tensors(0, 1), "pickle_unsupported", ("the top level (2",), ()),
    "integer keys below": ({"model": tensors(0, 1)}, "pickle_unsupported", ("model (2",), ()),
    "a dict": ({"model": tensors("w", "b")}, "pickle_wrapper", ("model (2 by name)",), ("model",)),
    "a step beside": (
        {"step": torch.tensor(9), "model": tensors("w", "b")},
        "pickle_wrapper",
        ("1 tensors at the top level", "model (2 by name)"),
        ("model",),
    ),
    "an optimizer": (
        {"opt": {"state": {0: tensors("m", "v"), 1: tensors("m", "v")}}, "net": tensors("w")},
        "pickle_wrapper",
        ("net (1 by name)", "opt.state (4 in lists"),
        ("net",),
    ),
    "deep": ({"a": {"b": {"c": {"d": tensors("w")}}}}, "pickle_wrapper", ("a.b.c.d (1",), ("a.b.c.d",)),
    "deep in a list": ({"a": {"b": [{"c": {"d": [tensors("w")]}}]}}, "pickle_unsupported", ("a.b (1",), ()),
    "two names": ({"x": SHARED, "y": SHARED, "z": [SHARED]}, "pickle_wrapper", ("x (2", "y (2"), ("x", "y")),
    "mixed keys": (tensors("w", 0, (1, 2)), "pickle_wrapper", ("1 tensors at the top", "the top level (2"), ()),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("what", UNSELECTED)
def test_tensors_that_are_not_at_the_top_are_named(tmp_path: Path, what: str, legacy: bool) -> None:
    content, code, places, wrappers = UNSELECTED[what]
    torch.save(content, tmp_path / "net.pth", **(LEGACY if legacy else {}))
    error = refused(tmp_path / "net.pth")
    assert error.code == code
    assert all(place in error.message for place in places), error.message
    assert tuple(error.details.get("wrappers", ())) == wrappers  # type: ignore[arg-type]
    done = CliRunner().invoke(main, ["manifest", str(tmp_path / "net.pth")])
    assert done.exit_code == 1 and not done.stdout and code in done.stderr


def test_lists_that_hold_themselves_are_counted_once(tmp_path: Path) -> None:
    ring: list[Any] = [torch.ones(1)]
    ring += [ring, ring]
    same = [torch.ones(1), torch.ones(1)]
    torch.save({"w": torch.ones(2), "ring": ring, "same": [same, same]}, tmp_path / "net.pth")
    message = refused(tmp_path / "net.pth").message
    assert "ring (1 " in message and "same (2 " in message


@pytest.mark.parametrize(
    ("wrapper", "names", "noted"), [("model", {"w", "b"}, "the top level (1"), (".", {"step"}, "model (2")]
)
def test_a_wrapper_selects_and_the_rest_is_noted(tmp_path: Path, wrapper: str, names: set[str], noted: str) -> None:
    torch.save({"step": torch.tensor(9), "model": tensors("w", "b")}, tmp_path / "net.pth")
    manifest = Manifest.from_checkpoint(tmp_path / "net.pth", wrapper)
    assert set(manifest) == names and noted in manifest.notes[0]
    done = CliRunner().invoke(main, ["manifest", str(tmp_path / "net.pth"), "--wrapper", wrapper])
    assert done.exit_code == 0 and noted in done.stderr


def test_a_plain_state_dict_has_no_notes(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "net.pth")
    manifest = Manifest.from_checkpoint(tmp_path / "net.pth")
    assert set(manifest) == {"weight", "bias"} and not manifest.notes
