"""Files of LoRAs: where the scale comes from, what is refused and why, and sets of several."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from port_kit.runtime import lora_sets
from port_kit.runtime.lora_families import family_of
from port_kit.runtime.lora_files import find_files, read_files
from port_kit.runtime.lora_sets import MAX_LORAS, read_set, set_folder, write_set
from tests.helpers import raises

Q = "blocks.0.self_attn.q"


def pair(module: str = Q, *, rank: int = 2, width: int = 8, form: str = "lora_{}.weight") -> dict[str, Tensor]:
    return {
        f"{module}.{form.format('A')}": torch.ones(rank, width),
        f"{module}.{form.format('B')}": torch.ones(width, rank),
    }


def write(file: Path, tensors: dict[str, Tensor], settings: Any = None, metadata: dict[str, str] | None = None) -> Path:
    file.parent.mkdir(exist_ok=True)
    save_file(tensors, file, metadata)
    if settings is not None:
        (file.parent / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return file


# -- scale ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "renamed.safetensors"])
def test_the_settings_beside_a_file_are_those_of_its_folder(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "peft" / name, pair(f"base_model.model.{Q}"), {"r": 2, "lora_alpha": 7})
    assert read_files(file).settings == read_files(file.parent).settings == {"r": 2, "lora_alpha": 7}
    assert find_files(file).paths == find_files(file.parent).paths == [file, file.parent / "adapter_config.json"]


def test_settings_beside_several_files_are_those_of_pefts_name(tmp_path: Path) -> None:
    other = write(tmp_path / "other.safetensors", pair(Q))
    peft = write(tmp_path / "adapter_model.safetensors", pair(Q), {"lora_alpha": 7})
    assert read_files(peft).settings == {"lora_alpha": 7} and read_files(other).settings == {}
    assert read_files(tmp_path).file == peft


def test_settings_that_may_be_of_several_files_are_not_guessed(tmp_path: Path) -> None:
    one = write(tmp_path / "one.safetensors", pair(Q), {"lora_alpha": 7})
    two = write(tmp_path / "two.safetensors", {**pair(Q), f"{Q}.alpha": torch.tensor(2.0)})
    with raises("lora_file", "one.safetensors", "lies beside several"):
        read_files(one)
    assert read_files(two).settings == {}, "its scale is in the file"


def test_pefts_file_without_its_settings_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "adapter_model.safetensors", pair(f"base_model.model.{Q}"))
    with raises("lora_file", "its scale is unknown") as caught:
        read_files(file)
    assert "adapter_config.json" in caught.value.hint
    write(file, {**pair(f"base_model.model.{Q}"), f"base_model.model.{Q}.alpha": torch.tensor(2.0)})
    assert not read_files(file).settings


def test_settings_without_a_scale_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "adapter_model.safetensors", pair(Q), {"r": 2})
    with raises("lora_file", "adapter_config.json", "no lora_alpha"):
        read_files(file)


def diffusers(**parts: Any) -> dict[str, str]:
    packed = {f"{part}.{name}": value for part, settings in parts.items() for name, value in settings.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(packed)}


def test_the_scale_in_diffusers_metadata_is_read(tmp_path: Path) -> None:
    metadata = diffusers(transformer={"r": 2, "lora_alpha": 7, "use_dora": False})
    file = write(tmp_path / "pytorch_lora_weights.safetensors", pair(f"transformer.{Q}"), metadata=metadata)
    assert read_files(file).settings["lora_alpha"] == 7
    write(file, pair(Q), metadata=diffusers(transformer={"lora_alpha": 7}, transformer_2={"lora_alpha": 8}))
    with raises("lora_file", "several scales"):
        read_files(file)
    write(file, pair(Q), metadata=diffusers(transformer={"lora_alpha": 7, "use_dora": True}))
    with raises("lora_file", "use_dora"):
        read_files(file)
    for broken in ("[", "[]"):
        write(file, pair(Q), metadata={"lora_adapter_metadata": broken})
        with raises("lora_file", "lora_adapter_metadata"):
            read_files(file)


def test_diffusers_writes_the_metadata_that_is_read(tmp_path: Path) -> None:
    from diffusers.loaders import WanLoraLoaderMixin
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_alpha=7, target_modules=["q"]).to_dict()
    layers = {name: tensor.contiguous() for name, tensor in pair(Q).items()}
    WanLoraLoaderMixin.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=config)
    assert read_files(tmp_path).settings["lora_alpha"] == 7


# -- refusals -------------------------------------------------------------------------------------------------------

PAGES = {
    "page": (b"<!DOCTYPE html><html></html>", "HTML page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "gguf": (b"GGUF" + bytes(64), "GGUF"),
    "empty": (b"", "it is empty"),
    "text": (b"a text that is no file of tensors", "not a whole safetensors file"),
    "pickle": (pickle.dumps({"a": 1}), "it is a pickle"),
}


@pytest.mark.parametrize(("content", "problem"), PAGES.values(), ids=PAGES)
def test_another_file_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "style.safetensors"
    file.write_bytes(content)
    with raises("lora_file", "style.safetensors", problem) as caught:
        read_files(file)
    assert caught.value.hint and str(tmp_path.parent) not in str(caught.value)


def test_a_saved_pickle_is_converted_first(tmp_path: Path) -> None:
    torch.save(pair(Q), tmp_path / "style.pt")
    for path in (tmp_path, tmp_path / "style.pt"):
        with raises("lora_file", "pickle") as caught:
            read_files(path)
        assert "port-kit convert style.pt lora.safetensors" in caught.value.hint


@pytest.mark.parametrize("keep", [4, 9, 60, -1])
def test_a_part_of_a_file_is_named(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "style.safetensors"
    file.write_bytes(save(pair(Q))[:keep])
    with raises("lora_file", "bytes" if keep < 0 else "not a whole safetensors file"):
        read_files(file)


def test_a_checkpoint_is_no_lora(tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", {f"{Q}.weight": torch.ones(8, 8), f"{Q}.bias": torch.ones(8)})
    with raises("lora_file", "it is a checkpoint, not a LoRA: 2 tensors of 72 values", f"{Q}.bias"):
        read_files(file)


@pytest.mark.parametrize("form", ["lora_te_{}", "lora_te1_{}", "text_encoder.{}", "text_encoders.clip_l.{}"])
def test_a_lora_of_a_text_encoder_alone_is_named(tmp_path: Path, form: str) -> None:
    module = form.format("encoder.layers.0.q" if "." in form else "encoder_layers_0_q")
    file = write(tmp_path / "style.safetensors", pair(module))
    with raises("lora_file", "adapts a text encoder only", module):
        read_files(file)


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with raises("source_missing", "none.safetensors"):
        read_files(tmp_path / "none.safetensors")


FAMILIES = {
    "lora_unet_double_blocks_0_img_attn_qkv": "FLUX or HunyuanVideo",
    "transformer.single_transformer_blocks.3.attn.to_q": "FLUX or HunyuanVideo",
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": "Stable Diffusion 1, 2 or XL",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "Stable Diffusion 1, 2 or XL",
    "transformer.transformer_blocks.0.attn1.to_q": "CogVideoX, LTX-Video or PixArt",
    "diffusion_model.blocks.0.self_attn.q": "Wan2.1 14B or Wan2.2 A14B",
    "base_model.model.blocks.0.attn1.to_q": "Wan2.1 14B or Wan2.2 A14B",
    "lora_unet_blocks_0_self_attn_q": "Wan2.1 14B or Wan2.2 A14B",
    "video_model.blocks.0.self_attn.q": "Ovi or DreamID-Omni",
    "video_dit.blocks.0.self_attn.q": "MOVA",
    "my.module": "",
}


@pytest.mark.parametrize(("module", "family"), FAMILIES.items())
def test_families_are_known_by_their_modules(module: str, family: str) -> None:
    assert family_of(pair(module, width=5120)) == family


@pytest.mark.parametrize(("width", "model"), [(1536, "Wan2.1 1.3B"), (3072, "Wan2.2-TI2V-5B"), (64, "width 64")])
def test_models_of_wan_are_known_by_their_width(width: int, model: str) -> None:
    assert model in family_of({"a.alpha": torch.tensor(1.0), **pair(Q, width=width)})


# -- sets -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of sets, away from the user's."""
    monkeypatch.setenv("PORT_KIT_CACHE", str(tmp_path / "cache"))
    return set_folder()


def test_equal_sets_are_one_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_set([("a.safetensors", 0.5), (tmp_path / "b", -1)])
    assert read_set(path) == [(tmp_path / "a.safetensors", 0.5), (tmp_path / "b", -1.0)]
    assert path == write_set([(tmp_path / "a.safetensors", 0.5), ("b", -1.0)]) and path.parent == folder
    assert (
        len({path, write_set([("a.safetensors", 0.6), ("b", -1)]), write_set([("b", -1), ("a.safetensors", 0.5)])}) == 3
    )
    assert folder.stat().st_mode & 0o077 == 0
    copied = tmp_path / path.name
    copied.write_bytes(path.read_bytes())
    assert read_set(copied) is None, "only files of the kit's folder are sets"


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -101.0])
def test_scales_of_a_set_are_bounded(folder: Path, scale: float) -> None:
    with raises("input_value", "b.safetensors", str(scale)):
        write_set([("a.safetensors", 1.0), ("b.safetensors", scale)])
    assert not folder.exists()


def test_a_set_is_bounded(folder: Path) -> None:
    for count in (0, MAX_LORAS + 1):
        with raises("input_count", f"{count} LoRAs"):
            write_set([("a", 1.0)] * count)
    assert not folder.exists()


def test_the_oldest_sets_are_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_sets, "_KEPT", 2)
    paths = [write_set([("a", scale), ("b", 1)]) for scale in (1, 2)]
    for path, age in zip(paths, (20, 10), strict=True):
        os.utime(path, (1e9 - age, 1e9 - age))
    write_set([("a", 1), ("b", 1)])  # used again
    paths.append(write_set([("a", 3), ("b", 1)]))
    assert {path for path in paths if path.exists()} == {paths[0], paths[2]} and len(list(folder.iterdir())) == 2
    with raises("lora_file", paths[1].name):
        read_set(paths[1])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PORT_KIT_CACHE", str(tmp_path / "file"))
    with raises("config_invalid", str(tmp_path / "file")) as caught:
        write_set([("a", 1.0), ("b", 1.0)])
    assert "PORT_KIT_CACHE" in caught.value.hint
