"""What a retouch model directory is assembled from."""

from __future__ import annotations

from port_kit.download import FileRule, GitCode, Recipe, Repository
from port_kit.parity import OriginalImplementation

from retouch import config

RECIPE = Recipe(
    name="retouch",
    repositories=(
        Repository(
            "retouch-lab/retouch",
            licence="apache-2.0",
            files=(
                FileRule(
                    "net_g_latest.pth",
                    folder="transformer",
                    name="model.safetensors",
                    convert=True,
                    wrapper="params_ema",
                ),
            ),
        ),
        Repository(
            "retouch-lab/codec",
            licence="apache-2.0",
            files=(FileRule("codec.safetensors", folder="codec", name="model.safetensors"),),
        ),
    ),
    model_index={
        "_class_name": "RetouchPipeline",
        "_diffusers_version": "0.40.0",
    },
    configs={
        "transformer": config.TRANSFORMER_CONFIG,
        "codec": config.CODEC_CONFIG,
    },
    code=(
        GitCode(
            name="retouch_original",
            url="https://github.com/retouch-lab/retouch",
            packages=("retouch_lab",),
        ),
    ),
)

#: Latent extents h, w; 45 tokens, which no two ranks can share evenly.
GRID = (5, 9)
LATENTS = {"normal": [1, 8, *GRID]}
TEXT = {"integers": [1, config.TEXT_LENGTH], "below": 256}
#: Run of the original code that ``port-kit verify parity`` compares with; see ``port_kit.parity.run_modules``.
ORIGINAL = OriginalImplementation(
    git_code="retouch_original",
    options={
        "components": {
            "transformer": {
                "build": "retouch_lab.editor:Editor",
                "inputs": {"latents": LATENTS, "picture": LATENTS, "time": [0.3], "text": TEXT},
                "modules": {
                    "trunk.*.att": "blocks.*.self_attn",
                    "trunk.*.cap": "blocks.*.cross_attn",
                    "trunk.*.ff": "blocks.*.down",
                    "trunk.*": "blocks.*",
                },
            },
            "codec": {
                "build": "retouch_lab.editor:Codec",
                "inputs": {"latents": LATENTS},
            },
        },
        "pipeline": {
            "call": "retouch_lab.edit:edit",
            "arguments": {
                "editor": "transformer",
                "codec": "codec",
                "noise": "noise",
                "photo": "image",
                "order": "prompt",
                "steps": "steps",
                "cfg": "guidance_scale",
            },
            "values": {
                "noise": LATENTS,
                "image": {"integers": [20, 36, 3], "below": 256},
                "prompt": "a cat on a wet street at night",
                "steps": 2,
                "guidance_scale": 3.0,
            },
        },
    },
)
