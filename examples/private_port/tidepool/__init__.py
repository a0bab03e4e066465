"""Tidepool: a prompt to a clip of 9 small frames. A port in a package of its own; copy it to begin yours.

This file is imported wherever ports are listed: it names everything and imports nothing heavy.
"""

from port_kit.port import Port
from tidepool.weights import COMPONENTS

PORT = Port(
    name="tidepool",
    title="Tidepool: a prompt to a clip of 9 frames, 48 x 64 (the example of a private port)",
    class_name="TidepoolPipeline",
    pipeline="tidepool.pipeline:TidepoolPipeline",
    output_type="video",
    recipe="tidepool.recipe:RECIPE",
    components=COMPONENTS,
    post_process="get_post_process_func",
    parallel="tidepool.tiny:subject",
    licences={"transformer": "Apache-2.0"},
)
