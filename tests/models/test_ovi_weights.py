"""Ovi's published checkpoint is covered at full size; a damaged one is refused by name."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from port_kit.errors import RemapError
from port_kit.manifest import Manifest
from port_kit.models.ovi import PORT
from port_kit.models.ovi.recipe import RECIPE
from port_kit.models.wan.transformer.config import OVI_TRANSFORMER_CONFIG
from port_kit.models.wan.transformer.model import build_transformer
from port_kit.models.wan.weights.transformer_rules import TRANSFORMER
from port_kit.pipeline.loading import build_components
from port_kit.port import Component
from port_kit.remap import load_components
from port_kit.runtime.single_process import single_rank
from port_kit.runtime.target_cache import component_target
from port_kit.testing.tiny import expand
from port_kit.testing.tiny_fusion import components
from tests.helpers import DATA

#: One tensor of each kind of rule: stems, a fused query, a merged pair, a second tower.
SAMPLE = (
    "audio_model.patch_embedding.2.w3.weight",
    "video_model.blocks.1.self_attn.q.weight",
    "audio_model.blocks.2.cross_attn.v_fusion.bias",
    "video_model.head.modulation",
)


@pytest.fixture(scope="module")
def published() -> Manifest:
    """Names, shapes and dtypes of the three checkpoints, which have one network."""
    packed = gzip.decompress((DATA / "manifests" / "ovi.json.gz").read_bytes())
    return Manifest.from_json(json.loads(packed), origin="ovi_fusion")


def test_every_published_tensor_has_its_place(published: Manifest) -> None:
    assert len(published) == 2073
    with single_rank(torch.bfloat16), torch.device("meta"):
        target = Manifest.from_module(build_transformer(OVI_TRANSFORMER_CONFIG))
    plan = TRANSFORMER.compile(published, target)
    assert {task.source for task in plan.tasks} == set(published)
    assert {task.target for task in plan.tasks} == set(target)
    assert sum(parameter.numel for parameter in target.values()) == 11_660_753_108


def test_the_tiny_model_is_the_published_one_made_small(published: Manifest) -> None:
    outline = expand(components(RECIPE)["transformer"].outline)
    assert outline == {name: (spec.shape, spec.dtype) for name, spec in published.items()}


@pytest.mark.parametrize("component", PORT.components, ids=lambda component: component.name)
def test_targets_are_recorded_for_coverage_without_torch(component: Component) -> None:
    assert component_target(PORT, component.name).origin == "recorded", "run: port-kit manifest --port ovi --record"


@pytest.fixture(scope="module")
def transformer(ovi_model: Path) -> Iterator[nn.Module]:
    with single_rank(torch.float32):
        yield build_components(ovi_model, PORT.components[:1])["transformer"]


@pytest.mark.parametrize("damage", ["missing", "renamed", "misshapen", "twice"])
@pytest.mark.parametrize("name", SAMPLE)
def test_a_damaged_checkpoint_is_refused_by_name(
    transformer: nn.Module, ovi_model: Path, tmp_path: Path, name: str, damage: str
) -> None:
    tensors: dict[str, Tensor] = load_file(ovi_model / "transformer" / "model.safetensors")
    stream = list(tensors.items())
    if damage == "twice":
        stream.append((name, tensors[name]))
    else:
        value = tensors.pop(name)
        if damage == "renamed":
            tensors[f"{name}x"] = value
        elif damage == "misshapen":
            tensors[name] = torch.zeros(value.numel() + 1)
        stream = list(tensors.items())
    (tmp_path / "transformer").mkdir()
    save_file(tensors, tmp_path / "transformer" / "model.safetensors")
    with pytest.raises(RemapError) as caught:
        load_components(
            {"transformer": (transformer, TRANSFORMER)},
            [(f"transformer.{key}", value) for key, value in stream],
            model=tmp_path,
        )
    assert name in str(caught.value)
