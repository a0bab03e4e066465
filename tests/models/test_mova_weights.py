"""Rules of MOVA: every tensor of the published checkpoints has a place, and damaged ones are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from port_kit.manifest import Manifest
from port_kit.models.mova import config, weights
from port_kit.models.mova.model.audio_vae import build_audio_vae
from port_kit.models.mova.model.bridge import build_bridge
from port_kit.models.mova.model.transformer import build_audio_transformer, build_transformer
from port_kit.models.wan.components.text_encoder import build_text_encoder
from port_kit.models.wan.components.video_vae import build_video_vae
from port_kit.port import resolve
from port_kit.remap import load_weights
from port_kit.runtime.single_process import single_rank
from port_kit.testing.rules import assert_covers, uncaught_mutations
from port_kit.testing.tiny import Tensors, expand, read_outline
from port_kit.testing.tiny_mova import OUTLINES, PARTS
from tests.helpers import raises

#: Component, outline of the published file, and its numbers of tensors and parameters.
PUBLISHED = (
    ("transformer", "mova_video_tower", 1095, 14_288_901_184),
    ("transformer_2", "mova_video_tower", 1095, 14_288_901_184),
    ("audio_transformer", "mova_audio_tower", 825, 1_419_193_472),
    ("bridge", "mova_bridge", 720, 2_659_737_600),
    ("audio_vae", "mova_audio_vae", 224, 371_539_137),
)


def source_of(outline: str) -> Manifest:
    """Names, shapes and dtypes of a published file."""
    return manifest(expand(read_outline(OUTLINES / f"{outline}.json")))


def manifest(tensors: Tensors) -> Manifest:
    return Manifest.from_json({name: [list(shape), dtype] for name, (shape, dtype) in tensors.items()})


def target_of(name: str, changes: Mapping[str, Any] | None = None) -> Manifest:
    """The full-size module of a component, or one with other sizes, on the meta device."""
    component = next(component for component in weights.COMPONENTS if component.name == name)
    values: Any = resolve(component.config)
    build: Any = resolve(component.build)
    with single_rank(torch.bfloat16), torch.device("meta"):
        return Manifest.from_module(build({**values, **(changes or {})}))


def with_weight_norm(tensors: Tensors) -> Tensors:
    """A decoder in which all convolutions but the 1x1 ones around the latents are direction and magnitude."""
    found: Tensors = {}
    for name, (shape, dtype) in tensors.items():
        if name.endswith(".weight") and "quant_conv" not in name:
            found[f"{name}_g"] = (shape[0], *(1 for _ in shape[1:])), dtype
            found[f"{name}_v"] = shape, dtype
        else:
            found[name] = shape, dtype
    return found


@pytest.mark.parametrize(("name", "outline", "tensors", "parameters"), PUBLISHED, ids=lambda value: str(value))
def test_rules_cover_the_published_checkpoint(name: str, outline: str, tensors: int, parameters: int) -> None:
    source = source_of(outline)
    elements = sum(torch.Size(spec.shape).numel() for spec in source.values())
    assert (len(source), elements) == (tensors, parameters)
    rules: Any = resolve(next(each.rules for each in weights.COMPONENTS if each.name == name))
    plan = assert_covers(rules, source, target_of(name), allow_downcast=True)
    assert {task.target for task in plan.tasks} == set(target_of(name))


@pytest.mark.parametrize("name", ["transformer", "audio_transformer", "bridge", "audio_vae"])
def test_damaged_checkpoints_are_noticed(name: str) -> None:
    part: Any = PARTS[name]
    tensors = {key: (tuple(value.shape), "bfloat16") for key, value in part.tensors().items()}
    rules: Any = resolve(f"port_kit.models.mova.weights:{name.upper()}")
    plan = assert_covers(rules, manifest(tensors), target_of(name, part.config), allow_downcast=True)
    assert uncaught_mutations(plan) == []


def test_a_decoder_with_weight_norm_is_the_same_decoder() -> None:
    part: Any = PARTS["audio_vae"]
    values = {**config.AUDIO_VAE_CONFIG, **part.config}
    plain = part.tensors()
    normed = dict(plain)
    for name in (name for name in plain if name.endswith(".weight") and "quant_conv" not in name):
        weight = normed.pop(name).float()
        dims = tuple(range(1, weight.ndim))
        normed[f"{name}_g"] = weight.norm(dim=dims, keepdim=True)
        normed[f"{name}_v"] = 3.0 * weight
    loaded = []
    for tensors in (plain, normed):
        vae = build_audio_vae(values)
        load_weights(vae, tensors.items(), weights.AUDIO_VAE)
        loaded.append(vae.state_dict())
    for name, weight in loaded[0].items():
        torch.testing.assert_close(loaded[1][name], weight, rtol=1e-5, atol=1e-6)


def test_full_size_weight_norm_is_covered() -> None:
    source = manifest(with_weight_norm(expand(read_outline(OUTLINES / "mova_audio_vae.json"))))
    assert len(source) == 298
    assert_covers(weights.AUDIO_VAE, source, target_of("audio_vae"), allow_downcast=True)


def test_names_of_the_libraries_stay() -> None:
    with torch.device("meta"):
        vae = Manifest.from_module(build_video_vae(config.VAE_CONFIG))
        encoder = Manifest.from_module(build_text_encoder(config.TEXT_ENCODER_CONFIG))
    assert (len(vae), len(encoder)) == (194, 242)
    assert_covers(weights.VAE, vae, vae)
    assert_covers(weights.TEXT_ENCODER, encoder, encoder)
    table = encoder["shared.weight"]
    doubled = {name: (spec.shape, spec.dtype) for name, spec in encoder.items()}
    doubled["encoder.embed_tokens.weight"] = table.shape, table.dtype
    assert_covers(weights.TEXT_ENCODER, manifest(doubled), encoder)


@pytest.mark.parametrize(
    ("build", "values", "change", "names"),
    [
        (build_transformer, config.TRANSFORMER_CONFIG, {"has_image_input": True}, ("has_image_input", "True")),
        (build_audio_transformer, config.AUDIO_TRANSFORMER_CONFIG, {"vae_type": "oobleck"}, ("vae_type", "oobleck")),
        (build_bridge, config.BRIDGE_CONFIG, {"interaction_strategy": "shallow_focus"}, ("shallow_focus", "full")),
        (build_bridge, config.BRIDGE_CONFIG, {"head_dim": 100}, ("video_dim 5120", "100")),
        (build_audio_vae, config.AUDIO_VAE_CONFIG, {"continuous": False}, ("continuous", "False")),
    ],
)
def test_an_unsupported_architecture_is_refused(
    build: Any, values: Mapping[str, Any], change: dict[str, Any], names: tuple[str, ...]
) -> None:
    with single_rank(torch.bfloat16), torch.device("meta"), raises("config_invalid", *names):
        build({**values, **change})


def test_towers_that_do_not_fit_are_refused() -> None:
    with single_rank(torch.bfloat16), torch.device("meta"):
        video = build_transformer(config.TRANSFORMER_CONFIG)
        audio = build_audio_transformer(config.AUDIO_TRANSFORMER_CONFIG)
        narrow = build_bridge({**config.BRIDGE_CONFIG, "audio_hidden_dim": 1024})
        shallow = build_transformer({**config.TRANSFORMER_CONFIG, "num_layers": 29})
        with raises("config_invalid", "1536", "1024"):
            video.join(audio, narrow)
        with raises("config_invalid", "29", "30"):
            shallow.join(audio, build_bridge(config.BRIDGE_CONFIG))
