"""What a driftwood model directory is assembled from."""

from __future__ import annotations

from port_kit.download import FileRule, GitCode, Recipe, Repository
from port_kit.parity import OriginalImplementation

from driftwood import config

RECIPE = Recipe(
    name="driftwood",
    repositories=(
        Repository(
            "driftwood-ai/driftwood",
            licence="apache-2.0",
            files=(
                FileRule(
                    "weights/driftwood_final.pth",
                    folder="transformer",
                    name="model.safetensors",
                    convert=True,
                    wrapper="ema",
                ),
            ),
        ),
        Repository(
            "driftwood-ai/projector",
            licence="apache-2.0",
            files=(FileRule("projector.bin", folder="projector", name="model.safetensors", convert=True),),
        ),
    ),
    model_index={
        "_class_name": "DriftwoodPipeline",
        "_diffusers_version": "0.40.0",
    },
    configs={
        "transformer": config.TRANSFORMER_CONFIG,
        "projector": config.PROJECTOR_CONFIG,
    },
    code=(
        GitCode(
            name="driftwood_original",
            url="https://github.com/driftwood-ai/driftwood",
            packages=("driftwood_lab",),
        ),
    ),
)

#: Latent extents F, h, w; 45 tokens, which no two ranks can share evenly.
GRID = (3, 6, 10)
LATENTS = {"normal": [1, 8, *GRID]}
TEXT = {"integers": [1, config.TEXT_LENGTH], "below": 256}
#: Run of the original code that ``port-kit verify parity`` compares with; see ``port_kit.parity.run_modules``.
ORIGINAL = OriginalImplementation(
    git_code="driftwood_original",
    options={
        "components": {
            "transformer": {
                "build": "driftwood_lab.nets:DriftNet",
                "prefix": "module.",
                "inputs": {"latents": LATENTS, "time": [0.3], "text": TEXT},
                "modules": {
                    "stages.*.mixer": "blocks.*.self_attn",
                    "stages.*.reader": "blocks.*.cross_attn",
                    "stages.*.mlp": "blocks.*.down",
                    "stages.*": "blocks.*",
                },
            },
            "projector": {
                "build": "driftwood_lab.nets:Projector",
                "inputs": {"latents": LATENTS},
            },
        },
        "pipeline": {
            "call": "driftwood_lab.run:dream",
            "arguments": {
                "net": "transformer",
                "projector": "projector",
                "z": "noise",
                "caption": "prompt",
                "n": "steps",
                "strength": "guidance_scale",
            },
            "values": {
                "noise": LATENTS,
                "prompt": "a cat walks over a wet street at night",
                "steps": 2,
                "guidance_scale": 3.0,
            },
        },
    },
)
