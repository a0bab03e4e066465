"""Whose names a checkpoint has is recorded in its files and read from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from port_kit.checkpoint.convert import convert_file
from port_kit.errors import RemapError
from port_kit.manifest import NAMING_KEY, Manifest


def save(path: Path, naming: str, name: str = "weight") -> Path:
    save_file({name: torch.ones(2)}, path, metadata={NAMING_KEY: naming} if naming else {"format": "pt"})
    return path


@pytest.mark.parametrize("naming", ["", "original", "converted"])
def test_recorded_naming_is_read_and_passes_through_json(tmp_path: Path, naming: str) -> None:
    manifest = Manifest.from_checkpoint(save(tmp_path / "model.safetensors", naming))
    assert manifest.naming == naming
    again = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert (again.naming, list(again)) == (naming, ["weight"])
    assert manifest.under("net.").naming == naming


def test_unknown_naming_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RemapError) as caught:
        Manifest.from_checkpoint(save(tmp_path / "model.safetensors", "renamed"))
    assert caught.value.code == "manifest_invalid"


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("converted", "converted", "converted"),
        ("original", "original", "original"),
        ("original", "", ""),
        ("converted", "original", None),
        ("converted", "", None),
    ],
)
def test_files_of_one_checkpoint_must_agree(
    tmp_path: Path, first: str, second: str, expected: str | None, indexed: bool
) -> None:
    save(tmp_path / "one.safetensors", first, "a")
    save(tmp_path / "two.safetensors", second, "b")
    if indexed:
        index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    if expected is None:
        with pytest.raises(RemapError) as caught:
            Manifest.from_checkpoint(tmp_path)
        assert caught.value.code == "remap_mixed"
    else:
        assert Manifest.from_checkpoint(tmp_path).naming == expected


def test_conversion_of_a_pickle_records_original_names(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "net.pth")
    convert_file(tmp_path / "net.pth", tmp_path / "net.safetensors")
    assert Manifest.from_checkpoint(tmp_path / "net.safetensors").naming == "original"
