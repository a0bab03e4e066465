"""The tiny model of the ports that share ``models/wan``: two million parameters instead of eighteen billion.

The outlines in ``outlines/`` are the names, shapes and dtypes of the published checkpoints. Sizes shrink so that the
model stays the same kind of thing: head size 16 still splits into (8, 4, 4) rotary dimensions for time, rows and
columns; four heads divide over two and four ranks; the audio stem's gated width stays the one that follows from the
model's width; every upsampling stage of the vocoder still halves its channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from port_kit.download import Recipe
from port_kit.testing.tiny import TinyComponent, TinyModel, TinyPart, TinyTokenizer, read_outline, tiny_repositories

OUTLINES = Path(__file__).with_name("outlines")

WIDTH, HEADS, LAYERS, FFN = 64, 4, 2, 128
TEXT_WIDTH, TEXT_HEADS, TEXT_LAYERS, TEXT_FFN, VOCABULARY = 64, 4, 2, 96, 512
GATED_CONV = 256  # 8 * WIDTH / 3, rounded up to a multiple of 256, as the original derives it

#: Changes of the size to ``model_index.json`` of ports that have the key: the pixels of a frame, and
#: a block that the tiny model has.
_INDEX = {"video_area": 64 * 96, "skip_block": 1}

_TOWER = {
    "dim": WIDTH,
    "num_heads": HEADS,
    "num_layers": LAYERS,
    "ffn_dim": FFN,
    "text_dim": TEXT_WIDTH,
}


def outline(name: str) -> dict[str, Any]:
    """Return a full-size outline by the name of its file, ``wan_transformer`` or ``umt5_xxl_encoder``."""
    return read_outline(OUTLINES / f"{name}.json")


#: The tiny form of the components that other ports may have, too.
SHARED: Mapping[str, TinyComponent] = {
    "text_encoder": TinyComponent(
        outline("umt5_xxl_encoder"),
        sizes={4096: TEXT_WIDTH, 10240: TEXT_FFN, 256384: VOCABULARY, 64: TEXT_HEADS},
        layers={"blocks": TEXT_LAYERS},
        config={
            "vocab_size": VOCABULARY,
            "d_model": TEXT_WIDTH,
            "d_kv": TEXT_WIDTH // TEXT_HEADS,
            "d_ff": TEXT_FFN,
            "num_layers": TEXT_LAYERS,
            "num_heads": TEXT_HEADS,
        },
    ),
    "vae": TinyComponent(outline("wan2_2_vae"), sizes={160: 6, 256: 8}, config={"base_dim": 6, "decoder_base_dim": 8}),
    "audio_vae": TinyComponent(outline("mmaudio_vae_16k"), sizes={384: 12}, config={"hidden_dim": 12}),
    "vocoder": TinyComponent(outline("bigvgan_16k"), sizes={24: 1}, config={"upsample_initial_channel": 64}),
}


def components(recipe: Recipe) -> dict[str, TinyComponent]:
    """Return the tiny form of each component of a fusion port, as changes to the recipe's configurations."""
    return {
        "transformer": TinyComponent(
            _transformer_outline(recipe),
            sizes={3072: WIDTH, 4096: TEXT_WIDTH, 14336: FFN, 8192: GATED_CONV},
            layers={"blocks": LAYERS},
            config=_towers(recipe.configs["transformer"]),
        ),
        **SHARED,
    }


def _transformer_outline(recipe: Recipe) -> dict[str, Any]:
    """Return the transformer's outline in the dtype of its published file: DreamID-Omni's float32, Ovi's bfloat16."""
    is_ovi = recipe.configs["transformer"]["rope"]["family"] == "ovi"
    tensors = outline("wan_transformer")
    return {name: [shape, "bfloat16" if is_ovi else dtype] for name, (shape, dtype) in tensors.items()}


def _towers(config: Mapping[str, Any]) -> dict[str, Any]:
    return {tower: {**config[tower], **_TOWER} for tower in ("video", "audio")}


def tiny_fusion_model(recipe: Recipe, folder: Path, *, seed: int = 0) -> TinyModel:
    """Write the tiny model of a fusion port into ``folder``, laid out as the recipe's Hub repositories.

    Args:
        recipe: ``dreamid_omni``'s, ``ovi``'s, or another one with the same components.
        folder: about 4 MB of files go to ``folder/<repository id>/<path>``.
        seed: of all weights.
    """
    parts: dict[str, TinyPart] = {**components(recipe), "tokenizer": TinyTokenizer(VOCABULARY)}
    tiny = tiny_repositories(recipe, parts, folder, seed=seed)
    return replace(tiny, model_index={key: value for key, value in _INDEX.items() if key in recipe.model_index})
