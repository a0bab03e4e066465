"""Components that are recognised by the names and shapes of their tensors, whatever their files are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from port_kit.inspect import Component, inspect
from port_kit.inspect.recognition import recognize
from port_kit.manifest import Manifest
from port_kit.pipeline.loading import load_pretrained
from port_kit.port import Pretrained
from port_kit.testing.tiny import expand, read_outline, scale
from port_kit.testing.tiny_fusion import OUTLINES
from tests.inspect import fake_repositories

SHIPPED = {
    "wan2_2_vae": ("vae", {160: 6, 256: 8}),
    "mmaudio_vae_16k": ("audio_vae", {384: 12}),
    "bigvgan_16k": ("vocoder", {24: 1}),
    "umt5_xxl_encoder": ("text_encoder", {4096: 64, 10240: 96}),
}
TINY_CLIP = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}


def outline(name: str) -> Any:
    return expand(read_outline(OUTLINES / f"{name}.json"))


@pytest.mark.parametrize("prefix", ["", "module.", "model.vae."])
@pytest.mark.parametrize("name", SHIPPED)
def test_components_of_ports_are_recognised(name: str, prefix: str) -> None:
    found = recognize(Manifest({f"{prefix}{key}": entry for key, entry in outline(name).items()}))
    assert found is not None
    assert (found.name, found.prefix, found.misfits) == (SHIPPED[name][0], prefix, 0)
    assert found.build.startswith("port_kit.models.wan.") and found.config


@pytest.mark.parametrize("name", SHIPPED)
def test_other_sizes_are_reported_as_such(name: str) -> None:
    part, sizes = SHIPPED[name]
    found = recognize(Manifest(scale(outline(name), sizes=sizes, layers={"blocks": 2})))
    assert found is not None and found.name == part and found.misfits > 0
    assert f"in other sizes ({found.misfits} tensors differ)" in found.text


def test_one_tensor_more_or_less_is_no_known_component() -> None:
    entries = outline("wan2_2_vae")
    assert recognize(Manifest({**entries, "encoder.extra.weight": ((3,), "float32")})) is None
    assert recognize(Manifest(dict(list(entries.items())[1:]))) is None
    assert recognize(Manifest({"blocks.0.weight": ((4, 4), "float32")})) is None


def clip(class_name: str) -> Any:
    """Return a tiny CLIP of transformers."""
    import transformers

    if class_name == "CLIPModel":
        config = transformers.CLIPConfig(text_config=TINY_CLIP, vision_config={**TINY_CLIP, "image_size": 64})
        return transformers.CLIPModel(config)
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**TINY_CLIP))


@pytest.mark.parametrize(
    "class_name",
    ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"],
)
def test_clip_is_recognised_and_its_configuration_loads_it(class_name: str, tmp_path: Path) -> None:
    """The published names have the encoder's root, the names that transformers 5 writes do not."""
    model = clip(class_name)
    (tmp_path / "part").mkdir()
    root = {"CLIPTextModel": "text_model.", "CLIPVisionModel": "vision_model."}.get(class_name, "")
    for prefix in dict.fromkeys(("", root)):
        state = {name if name.startswith(prefix) else f"{prefix}{name}": p for name, p in model.state_dict().items()}
        found = recognize(Manifest({name: (tuple(value.shape), "float32") for name, value in state.items()}))
        assert found is not None and found.pretrained == f"transformers:{class_name}"
        (tmp_path / "part" / "config.json").write_text(json.dumps(found.values))
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "part" / "model.safetensors")
        loaded = load_pretrained(Pretrained("part", found.pretrained, found.kind), tmp_path, torch.float32)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_misleading_names_of_files_do_not_matter(tmp_path: Path) -> None:
    """The VAE is called a text encoder, and the vocoder is under keys of a pickle that is called a VAE."""
    vocoder = {name: torch.zeros(()).expand(shape) for name, (shape, _) in outline("bigvgan_16k").items()}
    vae = scale(outline("wan2_2_vae"), sizes={160: 6, 256: 8})
    files = {
        "t5_text_encoder.safetensors": fake_repositories.safetensors({name: shape for name, (shape, _) in vae.items()}),
        "wan_vae.pth": fake_repositories.torch_file({"generator": vocoder, "steps": 3}),
    }
    found = inspect(str(fake_repositories.write(files, tmp_path / "model")))
    names = {part.name: part for part in found.components}
    assert recognized(names["t5_text_encoder"]) == "vae" and recognized(names["wan_vae"]) == "vocoder"
    facts = {finding.file: finding.fact for finding in found.evidence}
    assert "its tensors are those of the vocoder of the port" in facts["wan_vae.pth"]
    assert json.loads(json.dumps(found.to_dict()))["components"][0]["recognized"]["kind"] == "vae"


def recognized(part: Component) -> str:
    return part.recognized.name if part.recognized else ""
