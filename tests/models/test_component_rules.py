"""The components' rule sets: complete on the published checkpoints, strict on damaged ones."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from port_kit.errors import RemapError
from port_kit.manifest import Manifest
from port_kit.models.wan.components import configs
from port_kit.models.wan.components.audio_vae import build_audio_vae
from port_kit.models.wan.components.text_encoder import build_text_encoder
from port_kit.models.wan.components.video_vae import build_video_vae
from port_kit.models.wan.components.vocoder import build_vocoder
from port_kit.models.wan.parity import component_cases as golden
from port_kit.models.wan.weights import component_rules as rules
from port_kit.remap import RuleSet, load_weights
from port_kit.remap.transforms import find_transform
from tests.helpers import DATA, raises

Build = Callable[[Mapping[str, Any]], nn.Module]

FULL_SIZE = {
    "umt5_xxl_encoder": (build_text_encoder, configs.TEXT_ENCODER_CONFIG, rules.TEXT_ENCODER),
    "wan2_2_vae": (build_video_vae, configs.VAE_CONFIG, rules.VAE),
    "mmaudio_vae_16k": (build_audio_vae, configs.AUDIO_VAE_CONFIG, rules.AUDIO_VAE),
    "bigvgan_16k": (build_vocoder, configs.VOCODER_CONFIG, rules.VOCODER),
    "bigvgan_16k_parametrized": (build_vocoder, configs.VOCODER_CONFIG, rules.VOCODER),
}


def published(name: str) -> Manifest:
    """Names, shapes and dtypes of a published checkpoint."""
    packed = gzip.decompress((DATA / "manifests" / "components.json.gz").read_bytes())
    return Manifest.from_json(json.loads(packed)[name], origin=name)


def on_meta(build: Build, config: Mapping[str, Any]) -> Manifest:
    """The manifest of a component on the meta device."""
    with torch.device("meta"):
        return Manifest.from_module(build(config))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_rules_cover_the_published_checkpoint(name: str) -> None:
    build, config, rule_set = FULL_SIZE[name]
    source, target = published(name), on_meta(build, config)
    plan = rule_set.compile(source, target)
    assert {task.target for task in plan.tasks} == set(target)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_missing_a_surplus_and_a_reshaped_tensor_are_refused(name: str) -> None:
    build, config, rule_set = FULL_SIZE[name]
    source, target = dict(published(name)), on_meta(build, config)
    victim = list(source)[len(source) // 2]
    lacking = {key: spec for key, spec in source.items() if key != victim}
    renamed = {**lacking, f"{victim}x": source[victim]}
    reshaped = {**source, victim: ((*source[victim].shape, 2), source[victim].dtype)}
    for damaged in (lacking, renamed, reshaped):
        with pytest.raises(RemapError):
            rule_set.compile(Manifest(damaged), target)


def test_both_spellings_of_weight_norm_load_the_same(goldens: Path) -> None:
    weights = torch.load(goldens / golden.MMAUDIO_FOLDER / "best_netG.pt", weights_only=True)["generator"]
    to_new = (("weight_g", "parametrizations.weight.original0"), ("weight_v", "parametrizations.weight.original1"))
    pairs = to_new if any(name.endswith("weight_g") for name in weights) else [pair[::-1] for pair in to_new]
    respelled = {name.replace(*pairs[0]).replace(*pairs[1]): tensor for name, tensor in weights.items()}
    assert set(respelled) != set(weights)
    first, second = (_vocoder(goldens, state) for state in (weights, respelled))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_half_of_a_weight_norm_is_refused_by_name(goldens: Path) -> None:
    weights = torch.load(goldens / golden.MMAUDIO_FOLDER / "best_netG.pt", weights_only=True)["generator"]
    victim = next(name for name in weights if name.startswith("ups.1.0.") and not name.endswith("bias"))
    del weights[victim]
    with raises("remap_incomplete_group", "ups.1.0"):
        _vocoder(goldens, weights)


def test_loaded_names_are_all_parameters_and_buffers(goldens: Path) -> None:
    weights = torch.load(goldens / golden.MMAUDIO_FOLDER / "v1-16.pth", weights_only=True)
    module = build_audio_vae(configs.audio_vae_config(json.loads((goldens / "SET.json").read_text())["mmvae"]))
    loaded = load_weights(module, weights.items(), rules.AUDIO_VAE, prefix="audio_vae.")
    assert loaded == {f"audio_vae.{name}" for name in module.state_dict()}


@pytest.mark.parametrize("name", ["umt5_xxl_encoder", "wan2_2_vae"])
def test_checkpoints_in_the_names_of_diffusers_and_transformers_pass_through(name: str) -> None:
    build, config, rule_set = FULL_SIZE[name]
    target = on_meta(build, config)
    plan = rule_set.compile(Manifest({key: (spec.shape, spec.dtype) for key, spec in target.items()}), target)
    assert {task.source: task.target for task in plan.tasks} == {key: key for key in target}


def test_unit_filters_have_unit_norm_and_a_way_back() -> None:
    raw = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 6)[:, None, None]
    transform = find_transform("unit_filters")
    unit = transform.run({"": raw}, {}, raw.shape)
    norms = unit.flatten(1).norm(dim=1)
    assert torch.all(norms < 1.0)
    torch.testing.assert_close(norms[1:], torch.ones(5), atol=3e-3, rtol=0)
    again = transform.run(transform.undo(unit, {}, {"": raw.shape}), {}, raw.shape)
    torch.testing.assert_close(again, unit, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rule_set", [rules.TEXT_ENCODER, rules.VAE, rules.AUDIO_VAE, rules.VOCODER])
def test_rules_are_data(rule_set: RuleSet) -> None:
    assert RuleSet.from_toml(rule_set.to_toml()) == rule_set


def _vocoder(goldens: Path, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    module = build_vocoder(golden.read_vocoder_config(goldens))
    load_weights(module, weights.items(), rules.VOCODER)
    return module
