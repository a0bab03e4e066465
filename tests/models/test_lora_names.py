"""LoRAs of Wan2.2-TI2V-5B and the video tower: every module of Wan, under every trainer's name, at full size."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from port_kit.errors import RemapError
from port_kit.manifest import Manifest
from port_kit.models.dreamid_omni import PORT as DREAMID
from port_kit.models.ovi import PORT as OVI
from port_kit.models.wan.transformer.model import WanFusionTransformer
from port_kit.models.wan.weights.lora_names import WAN_NAMES
from port_kit.models.wan.weights.transformer_rules import TRANSFORMER
from port_kit.port import Port
from port_kit.remap.lora import remap_lora, restore_names
from port_kit.runtime.target_cache import component_target
from tests.remap.conversions import conversion

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def published() -> Manifest:
    """The fusion checkpoint: both ports publish these names and shapes."""
    return Manifest.from_json(json.loads(gzip.decompress((DATA / "manifests" / "ovi.json.gz").read_bytes())))


@pytest.fixture(scope="module")
def modules(published: Manifest) -> list[str]:
    return [name.removesuffix(".weight") for name in published if name.endswith(".weight")]


#: Wan's own name of each module, by that of diffusers; layer by layer, from diffusers' own conversion.
WAN = {
    target.removesuffix(".weight"): made["from"][0].removesuffix(".weight")
    for target, made in conversion("wan_t2v").map.items()
    if target.endswith(".weight")
}


@pytest.mark.parametrize("form", ["{}", "diffusion_model.{}", "transformer.{}", "base_model.model.{}", "lora_unet_{}"])
def test_all_modules_of_wan_are_known_by_both_names(modules: list[str], form: str) -> None:
    assert len(WAN) > 40
    for diffusers, wan in WAN.items():
        for name in (diffusers, wan):
            flat = name.replace(".", "_") if form.startswith("lora_unet") else name
            given = f"{form.format(flat)}.lora_down.weight"
            assert list(restore_names({given: 0}, modules, WAN_NAMES)) == [f"video_model.{wan}.lora_down.weight"]


@pytest.mark.parametrize("port", [OVI, DREAMID], ids=lambda port: port.name)
def test_a_lora_of_all_modules_fits_the_video_tower_alone(published: Manifest, modules: list[str], port: Port) -> None:
    lora: dict[str, torch.Tensor] = {}
    for module in modules:
        shape = published[f"{module}.weight"].shape
        if module.startswith("video_model.") and len(shape) > 1 and "fusion" not in module:
            wan = module.removeprefix("video_model.")
            ones = [1] * (len(shape) - 2)
            lora[f"diffusion_model.{wan}.lora_A.weight"] = torch.empty(4, *shape[1:])
            lora[f"diffusion_model.{wan}.lora_B.weight"] = torch.empty(shape[0], 4, *ones)
    target, parts = component_target(port, "transformer").manifest, WanFusionTransformer.packed_modules_mapping
    renamed = remap_lora(restore_names(lora, modules, WAN_NAMES), TRANSFORMER, target=target, parts=parts)
    assert len(renamed) == len(lora) == 2 * (30 * 10 + 7)
    assert not any(".audio" in name or name.startswith("audio") for name in renamed)
    assert {"blocks.29.video.self_attn.k.lora_B.weight", "blocks.0.video.cross_attn.v.lora_A.weight"} <= set(renamed)
    wider = {
        name: torch.empty(tensor.shape[0], 5120) if ".lora_A." in name else tensor for name, tensor in lora.items()
    }
    with pytest.raises(RemapError) as caught:
        remap_lora(restore_names(wider, modules, WAN_NAMES), TRANSFORMER, target=target, parts=parts)
    assert caught.value.code == "remap_shape"
