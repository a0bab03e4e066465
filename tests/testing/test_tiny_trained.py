"""The trained tiny model of Ovi: complete under the published names, with a tokenizer that knows its words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from tokenizers import Tokenizer

from port_kit.cli.download import command
from port_kit.errors import PortKitError
from port_kit.models.ovi.recipe import RECIPE
from port_kit.registry import find_port
from port_kit.testing.tiny_port import tiny_model_of
from port_kit.testing.tiny_trained import RELEASE, components, manifest, read_release, trained_model
from port_kit.testing.tokenizer import SPECIAL_TOKENS


def test_the_release_has_the_tensors_of_every_component() -> None:
    values, _ = read_release()
    expected = {
        name: {key: shape for key, (shape, _) in manifest(one).items()} for name, one in components(RECIPE).items()
    }
    assert {name: set(one) for name, one in values.items()} == {name: set(one) for name, one in expected.items()}
    assert all(value.isfinite().all() for one in values.values() for value in one.values())
    assert RELEASE.stat().st_size < 10_000_000


def test_checkpoints_have_the_trained_values(tmp_path: Path) -> None:
    tiny_model_of(find_port("ovi"), tmp_path, trained=True)
    found = 0
    for path in tmp_path.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if "video_model.head.modulation" in file.keys():  # not a mapping
                value = file.get_tensor("video_model.head.modulation")
                trained = read_release()[0]["transformer"]["video_model.head.modulation"]
                assert torch.equal(value.float().reshape(-1), trained.float().reshape(-1))
                found += 1
    assert found == 1
    (path,) = tmp_path.rglob("tokenizer.json")
    pieces = Tokenizer.from_file(str(path)).encode("red ball bounces").tokens
    assert [piece for piece in pieces if piece not in SPECIAL_TOKENS] == ["▁red", "▁ball", "▁bounces"]


def test_a_missing_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PortKitError, match="no trained weights") as caught:
        trained_model(RECIPE, tmp_path, release=tmp_path / "none.safetensors")
    assert caught.value.code == "outline_invalid"


def test_trained_weights_need_a_port_that_has_some_and_tiny(tmp_path: Path) -> None:
    with pytest.raises(PortKitError, match="port mova has no trained tiny model") as caught:
        tiny_model_of(find_port("mova"), tmp_path, trained=True)
    assert caught.value.code == "port_invalid"
    refused = CliRunner().invoke(command, ["ovi", "--trained"])
    assert refused.exit_code == 2 and "--trained needs --tiny" in refused.output
