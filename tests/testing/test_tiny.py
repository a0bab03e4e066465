"""Tiny checkpoints: outlines, scaling, values, containers, and the relation to checkpoints of the original code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from port_kit.models.dreamid_omni.recipe import RECIPE
from port_kit.testing.tiny import TinyComponent, TinyModel, expand, fill, scale, tiny_repositories, write_checkpoint
from port_kit.testing.tiny_fusion import outline, tiny_fusion_model
from tests.helpers import raises

#: Tensors and elements of the published checkpoints.
PUBLISHED = {
    "wan_transformer": (2073, 11_660_753_108),
    "wan2_2_vae": (196, 704_688_668),
    "umt5_xxl_encoder": (242, 5_680_910_336),
    "mmaudio_vae_16k": (57, 171_657_378),
    "bigvgan_16k": (784, 112_233_866),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_outlines_are_the_published_checkpoints(name: str) -> None:
    tensors = expand(outline(name))
    elements = sum(int(torch.Size(shape).numel()) for shape, _ in tensors.values())
    assert (len(tensors), elements) == PUBLISHED[name]


def test_expand_takes_alternatives_ranges_and_plain_names() -> None:
    tensors = expand({"a.{0..2}.{q,k}.weight": [[4, 2], "float32"], "b": [[], "bfloat16"]})
    assert list(tensors)[:3] == ["a.0.q.weight", "a.0.k.weight", "a.1.q.weight"]
    assert len(tensors) == 7
    assert tensors["b"] == ((), "bfloat16")
    assert expand({name: [list(shape), dtype] for name, (shape, dtype) in tensors.items()}) == tensors


def test_expand_refuses_a_name_twice() -> None:
    with raises("outline_invalid", "a.1"):
        expand({"a.{0,1}": [[1], "float32"], "a.{1..2}": [[1], "float32"]})


def test_scale_keeps_relations() -> None:
    tensors = expand({"blocks.{0..9}.qkv": [[9216, 3072, 7], "float32"], "out": [[192, 3072], "float32"]})
    scaled = scale(tensors, sizes={3072: 64}, layers={"blocks": 2})
    assert scaled == {
        "blocks.0.qkv": ((192, 64, 7), "float32"),
        "blocks.1.qkv": ((192, 64, 7), "float32"),
        "out": ((192, 64), "float32"),
    }


def test_scale_takes_a_listed_extent_before_a_multiple() -> None:
    tensors = {"q": ((4096, 64), "float32")}
    assert scale(tensors, sizes={64: 4, 4096: 48})["q"][0] == (48, 4)


def test_values_depend_on_name_and_seed_only() -> None:
    both = fill(expand({"{a,b}.weight": [[3, 5], "float32"]}), seed=1)
    alone = fill(expand({"b.weight": [[3, 5], "float32"]}), seed=1)
    other = fill(expand({"b.weight": [[3, 5], "float32"]}), seed=2)
    assert torch.equal(both["b.weight"], alone["b.weight"])
    assert not torch.equal(alone["b.weight"], other["b.weight"])
    assert not torch.equal(both["a.weight"], both["b.weight"])


@pytest.mark.parametrize("wrapper", ["", "generator", "app.model"])
def test_pickles_are_wrapped_as_told(tmp_path: Path, wrapper: str) -> None:
    write_checkpoint(tmp_path / "x.pt", {"w": torch.ones(2)}, wrapper=wrapper)
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    for key in filter(None, wrapper.split(".")):
        content = content[key]
    assert content["w"].tolist() == [1.0, 1.0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """DreamID-Omni's tiny model."""
    return tiny_fusion_model(RECIPE, tmp_path_factory.mktemp("hub"), seed=5)


def test_dreamid_omni_lies_in_its_repositories(tiny: TinyModel) -> None:
    assert {repository: sorted(files) for repository, files in tiny.repositories.items()} == {
        "XuGuo699/DreamID-Omni": ["dreamid_omni.safetensors"],
        "Wan-AI/Wan2.2-TI2V-5B": [
            "Wan2.2_VAE.pth",
            "google/umt5-xxl/special_tokens_map.json",
            "google/umt5-xxl/tokenizer.json",
            "google/umt5-xxl/tokenizer_config.json",
            "models_t5_umt5-xxl-enc-bf16.pth",
        ],
        "hkchengrex/MMAudio": ["ext_weights/best_netG.pt", "ext_weights/v1-16.pth"],
    }
    files = [path for repository in tiny.repositories.values() for path in repository.values()]
    assert sum(path.stat().st_size for path in files) < 12 << 20


def test_the_containers_are_the_original_ones(tiny: TinyModel) -> None:
    fusion = load_file(tiny.repositories["XuGuo699/DreamID-Omni"]["dreamid_omni.safetensors"])
    assert fusion["video_model.blocks.1.self_attn.q.weight"].shape == (64, 64)
    assert fusion["audio_model.patch_embedding.2.w1.weight"].shape == (256, 64, 7)
    wan = tiny.repositories["Wan-AI/Wan2.2-TI2V-5B"]
    text = torch.load(wan["models_t5_umt5-xxl-enc-bf16.pth"], weights_only=True)
    assert text["token_embedding.weight"].dtype == torch.bfloat16
    vocoder = torch.load(tiny.repositories["hkchengrex/MMAudio"]["ext_weights/best_netG.pt"], weights_only=True)
    assert list(vocoder) == ["generator"]


def test_the_tokenizer_loads_and_fits_the_encoder(tiny: TinyModel) -> None:
    from transformers import AutoTokenizer

    folder = tiny.repositories["Wan-AI/Wan2.2-TI2V-5B"]["google/umt5-xxl/tokenizer.json"].parent
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer("A cat says <S>Hello, {World}!<E>", padding="max_length", max_length=64)
    length = sum(encoded.attention_mask)
    ids = encoded.input_ids
    assert ids[length - 1] == 1 and set(ids[length:]) == {0}
    assert 2 not in ids
    assert max(ids) < tiny.configs["text_encoder"]["vocab_size"]
    assert len(tokenizer) <= tiny.configs["text_encoder"]["vocab_size"]


def test_a_part_that_nobody_gives_is_an_error(tmp_path: Path) -> None:
    component = TinyComponent(
        outline("wan_transformer"), sizes={3072: 8, 4096: 8, 14336: 8, 8192: 8}, layers={"blocks": 1}
    )
    with raises("outline_invalid", "text_encoder"):
        tiny_repositories(RECIPE, {"transformer": component}, tmp_path)


def test_outlines_scale_to_the_original_codes_own_tiny_checkpoints(goldens: Path) -> None:
    dims = json.loads((goldens / "SET.json").read_text())
    fusion = dims["fusion"]["video"]
    vae, text = dims["vae"], dims["t5"]
    checkpoints = goldens / "ckpts"
    wan = checkpoints / "Wan2.2-TI2V-5B"
    gated = -(-int(2 * 4 * fusion["dim"] / 3) // 256) * 256
    sizes = {3072: fusion["dim"], 4096: fusion["text_dim"], 14336: fusion["ffn_dim"], 8192: gated}
    expected = scale(expand(outline("wan_transformer")), sizes=sizes, layers={"blocks": fusion["num_layers"]})
    assert _shapes(expected) == _file_shapes(checkpoints / "DreamID_Omni" / "dreamid_omni.safetensors")
    expected = scale(expand(outline("wan2_2_vae")), sizes={160: vae["dim"], 256: vae["dec_dim"]})
    assert _shapes(expected) == _file_shapes(wan / "Wan2.2_VAE.pth")
    found = _file_shapes(wan / "models_t5_umt5-xxl-enc-bf16.pth")
    sizes = {4096: text["dim"], 10240: text["dim_ffn"], 64: text["num_heads"]}
    sizes[256384] = found["token_embedding.weight"][0]
    expected = scale(expand(outline("umt5_xxl_encoder")), sizes=sizes, layers={"blocks": text["encoder_layers"]})
    assert _shapes(expected) == found
    expected = scale(expand(outline("mmaudio_vae_16k")), sizes={384: dims["mmvae"]["hidden_dim"]})
    assert _shapes(expected) == _file_shapes(checkpoints / "MMAudio" / "ext_weights" / "v1-16.pth")


def _shapes(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (shape, _) in tensors.items()}


def _file_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
