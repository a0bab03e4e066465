"""Tidepool: a prompt to a clip of 9 small frames. A port in a package of its own; copy it to begin yours.

This file is imported wherever ports are listed: it names everything and imports nothing heavy.
"""

from port_kit.port import Port
from tidepool.weights import COMPONENTS

PORT = Port(
    name="tidepool",
    package=__name__,
    title="Tidepool: a prompt to a clip of 9 frames, 48 x 64 (the example of a private port)",
    class_name="TidepoolPipeline",
    output_type="video",
    components=COMPONENTS,
    parity="tidepool.parity:cases",
    example_prompt="a crab walks over wet sand",
    tiny={"num_inference_steps": 2},
)
