"""What a murmur model directory is assembled from."""

from __future__ import annotations

from port_kit.download import FileRule, GitCode, Recipe, Repository
from port_kit.parity import OriginalImplementation

from murmur import config

RECIPE = Recipe(
    name="murmur",
    repositories=(
        Repository(
            "murmur-audio/murmur",
            licence="apache-2.0",
            files=(
                FileRule(
                    "murmur_800k.pt",
                    folder="transformer",
                    name="model.safetensors",
                    convert=True,
                    wrapper="model",
                ),
            ),
        ),
        Repository(
            "murmur-audio/vocoder",
            licence="apache-2.0",
            files=(
                FileRule("vocoder.pth", folder="vocoder", name="model.safetensors", convert=True, wrapper="generator"),
            ),
        ),
    ),
    model_index={
        "_class_name": "MurmurPipeline",
        "_diffusers_version": "0.40.0",
    },
    configs={
        "transformer": config.TRANSFORMER_CONFIG,
        "vocoder": config.VOCODER_CONFIG,
    },
    code=(
        GitCode(
            name="murmur_original",
            url="https://github.com/murmur-audio/murmur",
            packages=("murmur_lab",),
        ),
    ),
)

#: Latent extents L; 45 tokens, which no two ranks can share evenly.
GRID = (45,)
LATENTS = {"normal": [1, 12, *GRID]}
TEXT = {"integers": [1, config.TEXT_LENGTH], "below": 256}
#: Run of the original code that ``port-kit verify parity`` compares with; see ``port_kit.parity.run_modules``.
ORIGINAL = OriginalImplementation(
    git_code="murmur_original",
    options={
        "components": {
            "transformer": {
                "build": "murmur_lab.denoiser:Murmur",
                "inputs": {"latents": LATENTS, "time": [0.3], "text": TEXT},
                "modules": {
                    "pairs.*.sides.0.proj": "joint_blocks.*.audio.out",
                    "pairs.*.sides.1.proj": "joint_blocks.*.text.out",
                    "pairs.*.sides.0.ffn": "joint_blocks.*.audio.feed_forward",
                    "pairs.*.sides.1.ffn": "joint_blocks.*.text.feed_forward",
                    "singles.*.sides.0.proj": "single_blocks.*.audio.out",
                    "singles.*.sides.0.ffn": "single_blocks.*.audio.feed_forward",
                },
            },
            "vocoder": {
                "build": "murmur_lab.vocoder:Vocoder",
                "inputs": {"latents": LATENTS},
            },
        },
        "pipeline": {
            "call": "murmur_lab.speak:speak",
            "arguments": {
                "model": "transformer",
                "vocoder": "vocoder",
                "noise": "noise",
                "text": "prompt",
                "nfe": "steps",
                "cfg": "guidance_scale",
            },
            "values": {
                "noise": LATENTS,
                "prompt": "rain falls on a tin roof",
                "steps": 2,
                "guidance_scale": 3.0,
            },
        },
    },
)
