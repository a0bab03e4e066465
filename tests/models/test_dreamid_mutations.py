"""Remove, rename, reshape or repeat one tensor of the tiny checkpoint: loading fails with the names of tensor and file.

Every tensor of the small components is tried, and a sample of the large ones that has every kind of name in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from port_kit.errors import RemapError
from port_kit.manifest import Manifest, TensorSpec
from port_kit.models.dreamid_omni import PORT
from port_kit.pipeline.loading import build_components
from port_kit.port import resolve
from port_kit.remap import RuleSet, load_components, load_local
from port_kit.runtime.single_process import single_rank

#: One of so many tensors is mutated; all of the query, key and value of one layer are.
STRIDES = {"transformer": 23, "text_encoder": 1, "vae": 13, "audio_vae": 3, "vocoder": 83}
FUSED = [f"video_model.blocks.1.self_attn.{slot}.{kind}" for slot in "qkv" for kind in ("weight", "bias")]


@pytest.fixture(scope="module")
def modules(dreamid_model: Path) -> Iterator[dict[str, nn.Module]]:
    """All components, built once: a load that fails leaves a module that can be loaded again."""
    with single_rank(torch.float32):
        yield build_components(dreamid_model, PORT.components)


def load(
    module: nn.Module, name: str, tensors: Mapping[str, Tensor] | list[tuple[str, Tensor]], folder: Path
) -> set[str]:
    """Load one component from a stream, with the headers of its folder."""
    rules: RuleSet = resolve(PORT.component(name).rules)
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    stream = ((f"{name}.{key}", tensor) for key, tensor in items)
    return load_components({name: (module, rules)}, stream, model=folder)


def checkpoint(model: Path, name: str) -> dict[str, Tensor]:
    """The component's tensors under their original names."""
    (path,) = (model / name).glob("*.safetensors")
    return load_file(path)


def refused(module: nn.Module, name: str, tensors: Mapping[str, Tensor], folder: Path) -> str:
    """Write the tensors as a checkpoint, load it, and return the error's text."""
    (folder / name).mkdir(exist_ok=True)
    save_file(dict(tensors), folder / name / "model.safetensors")
    with pytest.raises(RemapError) as caught:
        load(module, name, tensors, folder)
    with pytest.raises(RemapError) as local:  # the files alone give the same error
        load_local(module, folder / name, resolve(PORT.component(name).rules), prefix=f"{name}.")
    assert str(local.value) == str(caught.value)
    return str(caught.value)


def targets_of(module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Which parameters each tensor fills, from the compiled plan."""
    source = Manifest({key: TensorSpec(tuple(tensor.shape), "float32") for key, tensor in tensors.items()})
    rules: RuleSet = resolve(PORT.component(name).rules)
    plan = rules.compile(source, Manifest.from_module(module))
    return {key: [task.target for task in tasks] for key, tasks in plan.by_source().items()}


def sample(name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """The tensors that are mutated."""
    chosen = list(tensors)[:: STRIDES[name]]
    return [*chosen, *FUSED] if name == "transformer" else chosen


@pytest.mark.parametrize("name", list(STRIDES))
def test_the_unchanged_checkpoint_loads_completely(
    modules: dict[str, nn.Module], dreamid_model: Path, name: str
) -> None:
    loaded = load(modules[name], name, checkpoint(dreamid_model, name), dreamid_model)
    assert {f"{name}.{key}" for key, _ in modules[name].named_parameters()} <= loaded


@pytest.mark.parametrize("name", list(STRIDES))
def test_a_missing_tensor_is_named(
    modules: dict[str, nn.Module], dreamid_model: Path, tmp_path: Path, name: str
) -> None:
    """The error gives the expected name and the file of similar tensors."""
    tensors = checkpoint(dreamid_model, name)
    for key in sample(name, tensors):
        others = {other: tensor for other, tensor in tensors.items() if other != key}
        error = refused(modules[name], name, others, tmp_path)
        assert f"{key} is missing from model.safetensors" in error, error
        assert "did you mean" in error, error


@pytest.mark.parametrize("name", list(STRIDES))
def test_a_renamed_tensor_is_named_with_its_file(
    modules: dict[str, nn.Module], dreamid_model: Path, tmp_path: Path, name: str
) -> None:
    tensors = checkpoint(dreamid_model, name)
    for key in sample(name, tensors):
        renamed = f"{key}x"
        others = {other: tensor for other, tensor in tensors.items() if other != key}
        error = refused(modules[name], name, {**others, renamed: tensors[key]}, tmp_path)
        (line,) = [line for line in error.splitlines() if line.strip().startswith(f"unexpected: {renamed} ")]
        assert "(in model.safetensors)" in line and line.endswith(f"did you mean {key}?"), error


@pytest.mark.parametrize("name", list(STRIDES))
def test_a_misshapen_tensor_is_named_with_its_shape(
    modules: dict[str, nn.Module], dreamid_model: Path, tmp_path: Path, name: str
) -> None:
    tensors = checkpoint(dreamid_model, name)
    places = targets_of(modules[name], name, tensors)
    for key in sample(name, tensors):
        wide = torch.zeros(tensors[key].numel() + 1)
        error = refused(modules[name], name, {**tensors, key: wide}, tmp_path)
        assert f"[{wide.numel()}]" in error and key in error and "(in model.safetensors)" in error, error
        assert any(target in error for target in places[key]), error


@pytest.mark.parametrize("name", list(STRIDES))
def test_a_tensor_that_comes_twice_is_named(modules: dict[str, nn.Module], dreamid_model: Path, name: str) -> None:
    tensors = checkpoint(dreamid_model, name)
    for key in sample(name, tensors)[::3]:
        twice = [*tensors.items(), (key, tensors[key])]
        with pytest.raises(RemapError) as caught:
            load(modules[name], name, twice, dreamid_model)
        assert key in str(caught.value), str(caught.value)
