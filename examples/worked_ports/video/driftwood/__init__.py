"""driftwood on vLLM-Omni, out of tree."""

from __future__ import annotations

from port_kit.port import Port

from driftwood.weights import COMPONENTS

PORT = Port(
    name="driftwood",
    package=__name__,
    title="driftwood",
    class_name="DriftwoodPipeline",
    output_type="video",
    components=COMPONENTS,
    example_prompt="a cat walks over a wet street at night",
    tiny={
        "height": 32,
        "width": 48,
        "num_frames": 3,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
    },
    card="CARD.md",
)
