"""The toy port, found as a user's port would be: through PORT_KIT_PATH, in this process and in the engine's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from port_kit.registry import list_ports

PORTS = Path(__file__).parent / "ports"
WIDTH, LAYERS = 32, 2


@pytest.fixture(scope="module", autouse=True)
def toy_port() -> Iterator[None]:
    """Put the toy port on the path while a module's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORT_KIT_PATH", str(PORTS))
        list_ports.cache_clear()
        yield
    list_ports.cache_clear()


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of the toy: seeded weights under their original, unfused names."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models") / "toy_model"
    (folder / "transformer").mkdir(parents=True)
    index = {"_class_name": "ToyAVPipeline", "_diffusers_version": "0.40.0"}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer" / "config.json").write_text("{}")
    generator = torch.Generator().manual_seed(7)
    weights = {
        f"blocks.{layer}.{leaf}.weight": torch.randn(WIDTH, WIDTH, generator=generator) * WIDTH**-0.5
        for layer in range(LAYERS)
        for leaf in ("q", "k", "v", "out")
    }
    save_file(weights, folder / "transformer" / "model.safetensors")
    return folder
