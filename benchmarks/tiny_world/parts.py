"""The parts of the model: built from the port's own modules, started, kept as results, and named as published.

A result is ``FOLDER/<part>.safetensors``: the tensors of the port's module in bfloat16, with the configuration that
training decided and what was logged last in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from port_kit.manifest import Manifest
from port_kit.models.ovi import PORT
from port_kit.models.ovi.recipe import RECIPE
from port_kit.models.wan.components.vocoder import FILTER_TAPS, SnakeBeta
from port_kit.port import resolve
from port_kit.remap.export import convert, export
from port_kit.testing import tiny_trained
from port_kit.testing.tiny import fill

#: In the order of training.
PARTS = ("text_encoder", "vae", "audio_vae", "vocoder", "transformer")
COMPONENTS = tiny_trained.components(RECIPE)


def build(name: str, device: torch.device, config: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a part in float32 with the initial values of a training."""
    make: Any = resolve(PORT.component(name).build)
    changes = {**COMPONENTS[name].config, **(config or {})}
    with device:
        module: nn.Module = make({**RECIPE.configs[name], **changes})
        if name != "text_encoder":
            initialize(module)
    if name == "text_encoder":  # seeded values; it is not trained
        fill_with(module, name, fill(tiny_trained.manifest(COMPONENTS[name])))
    return module.requires_grad_(False)


def fill_with(module: nn.Module, name: str, source: Mapping[str, Tensor]) -> None:
    """Give a part the values of its published names.

    Raises:
        ValueError: a value of the module is left.
    """
    rules: Any = resolve(PORT.component(name).rules)
    plan = rules.compile(Manifest({n: (v.shape, str(v.dtype)[6:]) for n, v in source.items()}), _target(module))
    values = {key: value.float() for key, value in convert(plan, dict(source))}
    missing, _ = module.load_state_dict(values, strict=False)
    if lost := set(missing) & set(_target(module)):
        raise ValueError(f"the published tensors of {name} do not give {sorted(lost)}")


def initialize(module: nn.Module) -> None:
    """Give every value its start: modules' own where they have one, else normal by the number of inputs."""
    for owner in module.modules():
        if isinstance(owner, SnakeBeta):
            owner.alpha.data.zero_()
            owner.beta.data.zero_()
            owner.upsample_filter.copy_(_low_pass())
            owner.downsample_filter.copy_(_low_pass())
        elif isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.LayerNorm)):
            owner.reset_parameters()
        else:
            for name, value in owner.named_parameters(recurse=False):
                _start(type(owner).__name__, name, value.data)
    for name, value in module.named_parameters():
        if name.endswith("head.proj.weight"):
            value.data.zero_()
        elif "time_embedding" in name and name.endswith("weight"):
            value.data.normal_(std=0.02)


def _start(owner: str, name: str, value: Tensor) -> None:
    if name in ("bias", "gain"):
        value.zero_()
    elif name == "gamma" or owner in ("QKNorm", "FullWidthRMSNorm"):
        value.fill_(1.0)
    elif name == "modulation":
        value.normal_(std=value.shape[-1] ** -0.5)
    else:
        value.normal_(std=value[0].numel() ** -0.5)


def _low_pass() -> Tensor:
    """Return the filter of BigVGAN's activations: a Kaiser window of 12 taps, half of the band."""
    cutoff, half_width = 0.25, 0.3
    attenuation = 2.285 * (FILTER_TAPS / 2 - 1) * torch.pi * 4 * half_width + 7.95
    beta = 0.1102 * (attenuation - 8.7) if attenuation > 50 else 0.5842 * (attenuation - 21) ** 0.4
    window = torch.kaiser_window(FILTER_TAPS, periodic=False, beta=beta, device="cpu")
    time = torch.arange(FILTER_TAPS, device="cpu") - FILTER_TAPS / 2 + 0.5
    taps = 2 * cutoff * window * torch.sinc(2 * cutoff * time)
    return (taps / taps.sum()).view(1, 1, -1)


def save(folder: Path, name: str, module: nn.Module, config: Mapping[str, Any], facts: Mapping[str, Any]) -> Path:
    """Write a result."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().to("cpu", torch.bfloat16).clone() for key, value in _state(module).items()}
    path = folder / f"{name}.safetensors"
    save_file(tensors, path, metadata={"config": json.dumps(dict(config)), "facts": json.dumps(dict(facts))})
    return path


def _state(module: nn.Module) -> dict[str, Tensor]:
    names = set(_target(module))
    return {key: value for key, value in module.state_dict().items() if key in names}


def _target(module: nn.Module) -> Manifest:
    return Manifest.from_module(module)


def load(folder: Path, name: str, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """Read a result; return the module and its configuration."""
    from safetensors import safe_open

    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; train it first: --stage {name}=SECONDS")
    with safe_open(path, framework="pt") as file:
        config = json.loads((file.metadata() or {})["config"])
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}
    module = build(name, device, config)
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    lost = set(missing) & set(_target(module))
    if lost or unexpected:
        raise ValueError(f"{path} does not fill the module: missing {sorted(lost)}, unexpected {unexpected}")
    return module, config


def original(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Return a part's tensors under the published names, in bfloat16."""
    rules: Any = resolve(PORT.component(name).rules)
    source = {key: (shape, "float32") for key, (shape, _) in tiny_trained.manifest(COMPONENTS[name]).items()}
    plan = rules.compile(Manifest(source), _target(module), allow_downcast=True)
    state = _state(module)
    return {key: value.to(torch.bfloat16) for key, value in export(plan, state)}
