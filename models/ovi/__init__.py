"""Ovi: a prompt and an optional first frame to a video with audio."""

from __future__ import annotations

from port_kit.models.ovi.weights import COMPONENTS
from port_kit.models.wan.weights.components import SHARED_LICENCES
from port_kit.port import Port

_RECIPES = "port_kit.models.ovi.recipe"

PORT = Port(
    name="ovi",
    title="Ovi: a prompt, or a first frame and a prompt, to a 5 or 10 s video with audio",
    class_name="OviPipeline",
    pipeline="port_kit.models.ovi.pipeline:OviPipeline",
    output_type="video",
    references=("image",),
    recipe=f"{_RECIPES}:RECIPE",
    variants={
        "720x720_5s": f"{_RECIPES}:RECIPE",
        "960x960_5s": f"{_RECIPES}:RECIPE_960_5S",
        "960x960_10s": f"{_RECIPES}:RECIPE_960_10S",
    },
    components=COMPONENTS,
    pre_process="get_pre_process_func",
    parity="port_kit.models.wan.parity.pipeline_cases:ovi_cases",
    original="port_kit.models.ovi.recipe:ORIGINAL",
    parallel="port_kit.models.wan.parity.parallel_subjects:ovi_subject",
    request_options={
        "solver_name": "str",
        "video_negative_prompt": "str",
        "audio_negative_prompt": "str",
        "shift": "float",
        "video_guidance_scale": "float",
        "audio_guidance_scale": "float",
        "slg_layer": "int",
    },
    example_prompt=(
        "A street musician plays a violin under an awning while it rains. She looks up, smiles and says, "
        "<S>One more song before the train comes.<E> Audio: violin, steady rain, a clear female voice."
    ),
    seed=103,
    tiny={"num_inference_steps": 4},
    card="docs/ports/ovi.md",
    licences={"transformer": "Apache-2.0 (Ovi)", **SHARED_LICENCES, "reference code": "Apache-2.0"},
)
