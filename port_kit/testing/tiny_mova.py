"""The tiny model of the port ``mova``: the published names and files, in widths of 96 and 48 for 5120 and 1536.

The outlines in ``outlines/`` are the names, shapes and dtypes of the published checkpoints. The towers keep heads of
one width (12, which splits into 4, 4, 4 for time, rows and columns), eight and four of them, and unequal depths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.download import Recipe
from port_kit.port import resolve
from port_kit.testing.tiny import (
    TinyComponent,
    TinyModel,
    TinyPart,
    TinyPretrained,
    TinyTokenizer,
    read_outline,
    write_checkpoint,
)

if TYPE_CHECKING:
    import torch

OUTLINES = Path(__file__).with_name("outlines")

VIDEO_WIDTH, VIDEO_HEADS, VIDEO_LAYERS, VIDEO_FFN = 96, 8, 3, 112
AUDIO_WIDTH, AUDIO_HEADS, AUDIO_LAYERS, AUDIO_FFN = 48, 4, 2, 80
TEXT_WIDTH, VOCABULARY = 64, 512
#: Of the audio latents and of the audio decoder, 1/32 of the full-size ones.
LATENTS, DECODER = 4, 64
#: Width of the sinusoids, and channels of the first convolution of the video VAE.
SINUSOIDS, VAE_WIDTH = 256, 6

_CONFIG = "port_kit.models.mova.config"
_VIDEO = TinyComponent(
    read_outline(OUTLINES / "mova_video_tower.json"),
    sizes={5120: VIDEO_WIDTH, 13824: VIDEO_FFN, 4096: TEXT_WIDTH},
    layers={"blocks": VIDEO_LAYERS},
    config={
        "dim": VIDEO_WIDTH,
        "num_heads": VIDEO_HEADS,
        "num_layers": VIDEO_LAYERS,
        "ffn_dim": VIDEO_FFN,
        "text_dim": TEXT_WIDTH,
    },
)
_AUDIO = TinyComponent(
    read_outline(OUTLINES / "mova_audio_tower.json"),
    sizes={1536: AUDIO_WIDTH, 8960: AUDIO_FFN, 4096: TEXT_WIDTH, 256: SINUSOIDS, 128: LATENTS},
    layers={"blocks": AUDIO_LAYERS},
    config={
        "dim": AUDIO_WIDTH,
        "num_heads": AUDIO_HEADS,
        "num_layers": AUDIO_LAYERS,
        "ffn_dim": AUDIO_FFN,
        "text_dim": TEXT_WIDTH,
        "in_dim": LATENTS,
        "out_dim": LATENTS,
    },
)
_DIRECTIONS = ("audio_to_video_conditioners", "video_to_audio_conditioners")

#: Parts by folder of the model directory.
PARTS: Mapping[str, TinyPart] = {
    "transformer": _VIDEO,
    "transformer_2": _VIDEO,
    "audio_transformer": _AUDIO,
    "bridge": TinyComponent(
        read_outline(OUTLINES / "mova_bridge.json"),
        sizes={5120: VIDEO_WIDTH, 1536: AUDIO_WIDTH},
        layers=dict.fromkeys(_DIRECTIONS, AUDIO_LAYERS),
        config={
            "visual_layers": VIDEO_LAYERS,
            "audio_layers": AUDIO_LAYERS,
            "visual_hidden_dim": VIDEO_WIDTH,
            "audio_hidden_dim": AUDIO_WIDTH,
            "head_dim": VIDEO_WIDTH // VIDEO_HEADS,
        },
    ),
    "text_encoder": TinyPretrained(
        "transformers:UMT5EncoderModel",
        {
            "vocab_size": VOCABULARY,
            "d_model": TEXT_WIDTH,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "tokenizer": TinyTokenizer(VOCABULARY),
    "vae": TinyPretrained("diffusers:AutoencoderKLWan", {"base_dim": VAE_WIDTH}),
    "audio_vae": TinyComponent(
        read_outline(OUTLINES / "mova_audio_vae.json"),
        sizes={64: 2},
        config={"latent_dim": LATENTS, "decoder_dim": DECODER},
    ),
}
#: The published file is not known; 5 is the default of the original's script.
SCHEDULER = {"_class_name": "FlowMatchPairScheduler", "shift": 5.0, "num_train_timesteps": 1000}


def tiny_mova_model(recipe: Recipe, folder: Path, *, seed: int = 0) -> TinyModel:
    """Write the tiny model into ``folder``, laid out as the recipe's Hub repository.

    Args:
        recipe: of a variant of ``mova``.
        folder: about 3 MB of files go to ``folder/<repository id>/<path>``.
        seed: of all weights; the video towers have different ones.
    """
    (repository,) = recipe.repositories
    root = folder / repository.repo_id
    for index, rule in enumerate(repository.files):
        target = root / rule.pattern.removesuffix("/*")
        target.mkdir(parents=True, exist_ok=True)
        _write(rule.folder, target, seed + index)
    files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
    return TinyModel({repository.repo_id: files}, configs={}, model_index={"height": 64, "width": 96})


def _calmed(name: str, values: torch.Tensor) -> torch.Tensor:
    """Return values that do not amplify rounding, from step to step and in the decoder.

    Flows are small beside the noise. The decoder's activations divide by their frequencies, which are near 1, and its
    residual units stay near the identity.
    """
    if name.endswith(".alpha"):
        return values + 1
    scale = {"head.head.weight": 0.25, "block.3.weight": 0.1}
    return values * next((factor for ending, factor in scale.items() if name.endswith(ending)), 1.0)


def _write(name: str, folder: Path, seed: int) -> None:
    """Write the files of a folder of the model directory."""
    if name == "scheduler":
        (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER), encoding="utf-8")
        return
    part = PARTS[name]
    if not isinstance(part, TinyComponent):
        part.write(folder, seed)
        return
    tensors = {key: _calmed(key, value) for key, value in part.tensors(seed).items()}
    write_checkpoint(folder / "diffusion_pytorch_model.safetensors", tensors)
    full: Any = resolve(f"{_CONFIG}:{name.removesuffix('_2').upper()}_CONFIG")
    (folder / "config.json").write_text(json.dumps({**full, **part.config}), encoding="utf-8")
