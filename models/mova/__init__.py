"""MOVA: a first frame and a prompt to a video with audio."""

from __future__ import annotations

from port_kit.models.mova.weights import COMPONENTS
from port_kit.port import Port

PORT = Port(
    name="mova",
    package=__name__,
    title="MOVA: a first frame and a prompt to an 8 s video with audio",
    class_name="MOVAPipeline",
    output_type="video",
    references=("image",),
    first_frame=True,
    variants={"720p": "RECIPE", "360p": "RECIPE_360P"},
    components=COMPONENTS,
    parity="port_kit.models.mova.parity:cases",
    example_prompt=(
        "A street musician plays a violin under an awning while it rains. She looks up, smiles and says: "
        '"One more song before the train comes." Steady rain, a violin, a clear female voice.'
    ),
    seed=42,
    tiny={"height": 64, "width": 96, "num_frames": 17, "num_inference_steps": 4},
    tiny_model="port_kit.testing.tiny_mova:tiny_mova_model",
    # a step of each video tower; a small scale, since guidance multiplies the rounding that the second step starts with
    parallel={"num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.5},
    card="docs/ports/mova.md",
)
