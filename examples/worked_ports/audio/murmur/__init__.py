"""murmur on vLLM-Omni, out of tree."""

from __future__ import annotations

from port_kit.port import Port

from murmur.weights import COMPONENTS

PORT = Port(
    name="murmur",
    package=__name__,
    title="murmur",
    class_name="MurmurPipeline",
    output_type="audio",
    components=COMPONENTS,
    request_options={"audio_length": "float"},
    example_prompt="rain falls on a tin roof",
    tiny={
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "extra_args": {
            "audio_length": 2.0,
        },
    },
    card="CARD.md",
)
