"""Families of models by the names and widths in a LoRA, for errors about a LoRA of another model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from port_kit.checkpoint.lora_names import FLAT_PREFIXES, PREFIXES, read_entry, without_prefixes

#: Modules of text encoders in files of kohya-style trainers, diffusers and ComfyUI.
_TEXT_ENCODER = re.compile(r"(?:lora_te\d?_|text_encoders?(?:_\d+)?[._]|te\d?[._]|cond_stage_model\.).*")
#: Families by a module that their LoRAs adapt, dots written as underscores; the first match counts.
_FAMILIES = {
    "MOVA": r"video_dit(_2)?_blocks_\d+_|dual_tower_bridge_",
    "Ovi or DreamID-Omni": r"(video|audio)_model_blocks_\d+_",
    "FLUX or HunyuanVideo": r"(double|single)_blocks_\d+_|single_transformer_blocks_\d+_",
    "Stable Diffusion 3": r"joint_blocks_\d+_",
    "Stable Diffusion 3 or Qwen-Image": r"transformer_blocks_\d+_attn_add_[qkv]_proj",
    "Stable Diffusion 1, 2 or XL": r"(down|mid|up|input|middle|output)_blocks?_",
    "CogVideoX, LTX-Video or PixArt": r"transformer_blocks_\d+_attn1_",
    "Wan": r"blocks_\d+_((self|cross)_attn_(q|k|v|o)|attn[12]_to_(q|k|v|out_0))$",
}
#: Models of Wan by the width of their attention.
_WAN = {1536: "Wan2.1 1.3B", 3072: "Wan2.2-TI2V-5B", 5120: "Wan2.1 14B or Wan2.2 A14B"}


def is_of_text_encoder(module: str) -> bool:
    """Return True if a module of a file belongs to a text encoder."""
    return any(_TEXT_ENCODER.fullmatch(bare) for bare in without_prefixes(module, PREFIXES))


def family_of(tensors: Mapping[str, Any]) -> str:
    """Return the family that a LoRA was trained for, by its tensors; empty if it is not known."""
    modules: dict[str, Any] = {}
    for name, tensor in tensors.items():
        entry = read_entry(name)
        if entry is not None and entry.kind == "A":
            modules |= dict.fromkeys(_flat_names(entry.module), tensor)
    for family, pattern in _FAMILIES.items():
        found = next((tensor for name, tensor in modules.items() if re.match(pattern, name)), None)
        if found is not None:
            return _wan(found.shape) if family == "Wan" else family
    return ""


def _wan(shape: tuple[int, ...]) -> str:
    return _WAN.get(shape[-1], f"a Wan model of width {shape[-1]}")


def _flat_names(module: str) -> Iterator[str]:
    """Yield the names of a module without prefixes, with underscores in place of dots."""
    for bare in without_prefixes(module, PREFIXES):
        for prefix in FLAT_PREFIXES:
            bare = bare.removeprefix(prefix)
        yield bare.replace(".", "_")
