"""retouch on vLLM-Omni, out of tree."""

from __future__ import annotations

from port_kit.port import Port

from retouch.weights import COMPONENTS

PORT = Port(
    name="retouch",
    package=__name__,
    title="retouch",
    class_name="RetouchPipeline",
    output_type="image",
    components=COMPONENTS,
    references=("image",),
    example_prompt="a cat on a wet street at night",
    tiny={
        "height": 32,
        "width": 48,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
    },
    card="CARD.md",
)
