"""LoRAs of MOVA: adapters of both video towers, the audio tower and the bridge act as weights that were merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.lora.request import LoRARequest
from vllm_omni.diffusion.lora.manager import DiffusionLoRAManager
from vllm_omni.errors import OmniClientError

from port_kit.models.mova import PORT
from port_kit.models.mova.pipeline import MOVAPipeline
from port_kit.models.mova.recipe import FOLDERS
from port_kit.models.wan.transformer.modality_io import TextContext
from port_kit.pipeline.loading import load_pipeline
from port_kit.runtime.single_process import single_rank
from port_kit.testing.tiny_port import download_tiny

RANK, ALPHA = 4, 6.0
TOWERS = ("transformer", "transformer_2")
#: Relative difference (L2) of flows: adapters and merged weights round differently.
TOLERANCE = 1e-4
_ATTENTIONS = [f"{kind}.{leaf}" for kind in ("self_attn", "cross_attn") for leaf in "qkvo"]
_TOWER = [f"blocks.{layer}.{leaf}" for layer in (0, 1) for leaf in (*_ATTENTIONS, "ffn.0", "ffn.2")]
#: Modules that the original's trainers adapt, by component.
MODULES = {
    "transformer": [*_TOWER, "blocks.2.ffn.0", "text_embedding.0"],
    "transformer_2": _TOWER,
    "audio_transformer": _TOWER,
    "bridge": [
        f"{direction}_conditioners.{layer}.inner.{leaf}"
        for direction in ("audio_to_video", "video_to_audio")
        for layer in (0, 1)
        for leaf in "qkvo"
    ],
}
Adapters = dict[str, dict[str, tuple[Tensor, Tensor]]]
Flows = dict[str, tuple[Tensor, ...]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(download_tiny(PORT, tmp_path_factory.mktemp("models") / "mova").directory)


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with single_rank(torch.float32), torch.inference_mode():
        yield


def weights_of(model: Path, component: str) -> dict[str, Tensor]:
    """Return the checkpoint of a component, original names."""
    return {
        name: value for file in (model / component).glob("*.safetensors") for name, value in load_file(file).items()
    }


@pytest.fixture(scope="module")
def adapters(model: Path) -> Adapters:
    """A and B of each module; those of the two video towers differ."""
    generator = torch.Generator().manual_seed(0)
    made: Adapters = {}
    for component, modules in MODULES.items():
        weights = weights_of(model, component)
        made[component] = {}
        for module in modules:
            rows, columns = weights[f"{module}.weight"].shape
            a = torch.randn(RANK, columns, generator=generator) / columns**0.5
            made[component][module] = a, torch.randn(rows, RANK, generator=generator) / 4
    return made


def peft(component: str, module: str) -> tuple[str, str]:
    """As the trainer for several GPUs saves it."""
    return f"{FOLDERS_OF[component]}.{module}.lora_A.weight", f"{FOLDERS_OF[component]}.{module}.lora_B.weight"


def low_resource(component: str, module: str) -> tuple[str, str]:
    """As the trainer for one GPU saves it."""
    return f"{FOLDERS_OF[component]}.{module}.lora_A", f"{FOLDERS_OF[component]}.{module}.lora_B"


def named(component: str, module: str) -> tuple[str, str]:
    """As PEFT saves it, with the name of the adapter."""
    return f"base_model.model.{FOLDERS_OF[component]}.{module}.lora_A.default.weight", (
        f"base_model.model.{FOLDERS_OF[component]}.{module}.lora_B.default.weight"
    )


FOLDERS_OF = {name: folder for folder, name in FOLDERS.items()}
FORMS = [peft, low_resource, named]


def write(folder: Path, adapters: Adapters, form: Callable[[str, str], tuple[str, str]] = peft) -> Path:
    """Write a LoRA with the original's alpha in PEFT's settings."""
    tensors: dict[str, Tensor] = {}
    for component, own in adapters.items():
        for module, (a, b) in own.items():
            name_of_a, name_of_b = form(component, module)
            tensors |= {name_of_a: a, name_of_b: b}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q", "v"], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def merge(model: Path, adapters: Adapters, folder: Path) -> Path:
    """Write a model directory whose weights contain the adapters, in float32: the checkpoint's are bfloat16."""
    shutil.copytree(model, folder)
    for component, own in adapters.items():
        for file in (folder / component).glob("*.safetensors"):
            tensors = load_file(file)
            for module, (a, b) in own.items():
                name = f"{module}.weight"
                if name in tensors:
                    tensors[name] = tensors[name].float() + ALPHA / RANK * b @ a
            save_file(tensors, file, {"format": "pt"})
    return folder


def flows(pipeline: MOVAPipeline, tower: str) -> tuple[Tensor, ...]:
    """Return the flows of a small clip."""
    module = getattr(pipeline, tower)
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(1, module.config.in_channels, 2, 4, 6, generator=generator)
    audio = torch.randn(1, 7, pipeline.audio.latent_dim, generator=generator)
    text = torch.randn(1, 5, module.config.text_dim, generator=generator)
    texts = TextContext(text), TextContext(text)
    found: tuple[Tensor, ...] = module(video, audio, torch.tensor(700.0), *texts, fps=24.0)
    return found


@pytest.fixture(scope="module")
def expected(model: Path, adapters: Adapters, tmp_path_factory: pytest.TempPathFactory) -> Flows:
    """Flows of both towers with the adapters of all parts merged."""
    pipeline = load_pipeline(merge(model, adapters, tmp_path_factory.mktemp("merged") / "mova"))
    return {tower: flows(pipeline, tower) for tower in TOWERS}


def adapted(pipeline: MOVAPipeline, folder: Path) -> DiffusionLoRAManager:
    """Activate a LoRA as a worker does."""
    manager = DiffusionLoRAManager(pipeline, torch.device("cpu"), torch.float32)
    manager.set_active_adapter(LoRARequest("style", 1, str(folder)))
    return manager


def differences(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> list[float]:
    """Return the relative difference (L2) of both flows."""
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_lora_adapts_every_part(form: Any, model: Path, adapters: Adapters, expected: Flows, tmp_path: Path) -> None:
    pipeline = load_pipeline(model)
    before = {tower: flows(pipeline, tower) for tower in TOWERS}
    manager = adapted(pipeline, write(tmp_path / "lora", adapters, form))
    for tower in TOWERS:
        found = flows(pipeline, tower)
        assert max(differences(found, expected[tower])) < TOLERANCE
        assert min(differences(found, before[tower])) > 100 * TOLERANCE
    manager.set_active_adapter(None)
    assert all(max(differences(flows(pipeline, tower), before[tower])) < TOLERANCE for tower in TOWERS)


@pytest.mark.parametrize("component", MODULES)
def test_each_part_has_its_own_adapters(
    component: str, model: Path, adapters: Adapters, expected: Flows, tmp_path: Path
) -> None:
    """Without those of one part, the flows of the towers that it serves are others."""
    rest = {name: own for name, own in adapters.items() if name != component}
    pipeline = load_pipeline(model)
    adapted(pipeline, write(tmp_path / "lora", rest))
    served = [component] if component in TOWERS else list(TOWERS)
    for tower in TOWERS:
        changed = max(differences(flows(pipeline, tower), expected[tower]))
        assert changed > 10 * TOLERANCE if tower in served else changed < TOLERANCE


def test_a_lora_of_wan_adapts_both_video_towers(model: Path, adapters: Adapters, tmp_path: Path) -> None:
    """Names without a part, in diffusers' form."""
    own = {module: adapters["transformer"][module] for module in _TOWER if ".ffn." in module}
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in own.items():
        name = f"transformer.{module.replace('ffn.0', 'ffn.net.0.proj').replace('ffn.2', 'ffn.net.2')}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    folder = write(tmp_path / "lora", {})
    save_file(tensors, folder / "adapter_model.safetensors")
    pipeline = load_pipeline(model)
    adapted(pipeline, folder)
    merged = load_pipeline(merge(model, dict.fromkeys(TOWERS, own), tmp_path / "mova"))
    for tower in TOWERS:
        assert max(differences(flows(pipeline, tower), flows(merged, tower))) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("video_dit_3.blocks.0.self_attn.q", "video_dit_3"),
        ("video_dit.blocks.7.self_attn.q", "blocks.7"),
        ("dual_tower_bridge.audio_to_video_conditioners.0.inner.w", "inner.w"),
    ],
)
def test_a_module_that_no_part_has_is_refused(name: str, found: str, model: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "lora", {})
    tensors = {f"{name}.lora_A.weight": torch.zeros(RANK, 96), f"{name}.lora_B.weight": torch.zeros(96, RANK)}
    save_file(tensors, folder / "adapter_model.safetensors")
    pipeline = load_pipeline(model)
    with pytest.raises(OmniClientError, match=found):
        adapted(pipeline, folder)
