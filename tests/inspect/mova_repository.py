"""MOVA's tiny model in the layout of its repository: two video towers, an audio tower, a bridge, three known parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from port_kit.models.mova.recipe import RECIPE
from port_kit.testing.tiny_mova import tiny_mova_model

_OWN = "mova.diffusion.models"
#: The index of the published repositories.
INDEX: Mapping[str, Any] = {
    "_class_name": "MOVA",
    "_diffusers_version": "0.36.0",
    "audio_dit": [f"{_OWN}.wan_audio_dit", "WanAudioModel"],
    "audio_vae": [f"{_OWN}.dac_vae", "DAC"],
    "audio_vae_type": "dac",
    "boundary_ratio": 0.9,
    "dual_tower_bridge": [f"{_OWN}.interactionv2", "DualTowerConditionalBridge"],
    "scheduler": ["mova.diffusion.schedulers.flow_match_pair", "FlowMatchPairScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "video_dit": [f"{_OWN}.wan_video_dit", "WanModel"],
    "video_dit_2": [f"{_OWN}.wan_video_dit", "WanModel"],
    "video_vae": ["diffusers", "AutoencoderKLWan"],
}
#: The parts that denoise.
DENOISERS = ("audio_dit", "dual_tower_bridge", "video_dit", "video_dit_2")


def write_mova(folder: Path) -> Path:
    """Write the repository; return its folder."""
    (repository,) = RECIPE.repositories
    tiny_mova_model(RECIPE, folder)
    root = folder / repository.repo_id
    (root / "model_index.json").write_text(json.dumps(INDEX), encoding="utf-8")
    return root


def hide_names(root: Path) -> None:
    """Give the tensors of the parts that denoise names that no rule knows."""
    from safetensors.torch import load_file, save_file

    for part in DENOISERS:
        for file in (root / part).glob("*.safetensors"):
            tensors = {f"net.{name.replace('.q.', '.query.')}": value for name, value in load_file(file).items()}
            save_file({name.replace("net.blocks", "stack"): value for name, value in tensors.items()}, file)
