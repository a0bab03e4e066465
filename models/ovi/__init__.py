"""Ovi: a prompt and an optional first frame to a video with audio."""

from __future__ import annotations

from port_kit.models.ovi.weights import COMPONENTS
from port_kit.models.wan.pipeline.request import MORE_OPTIONS
from port_kit.port import Port

PORT = Port(
    name="ovi",
    package=__name__,
    title="Ovi: a prompt, or a first frame and a prompt, to a 5 or 10 s video with audio",
    class_name="OviPipeline",
    output_type="video",
    references=("image",),
    first_frame=True,
    timeline_guides=True,
    variants={"720x720_5s": "RECIPE", "960x960_5s": "RECIPE_960_5S", "960x960_10s": "RECIPE_960_10S"},
    components=COMPONENTS,
    parity="port_kit.models.wan.parity.pipeline_cases:ovi_cases",
    request_options={
        "solver_name": "str",
        "video_negative_prompt": "str",
        "audio_negative_prompt": "str",
        "shift": "float",
        "guidance_gate_step": "int",
        "video_guidance_scale": "float",
        "audio_guidance_scale": "float",
        "slg_layer": "int",
        "uncond_skip_layers": "str",
        "slg_start": "float",
        "slg_stop": "float",
    },
    more_options=(*MORE_OPTIONS, "slg_start_percent", "slg_end_percent"),
    example_prompt=(
        "A street musician plays a violin under an awning while it rains. She looks up, smiles and says, "
        "<S>One more song before the train comes.<E> Audio: violin, steady rain, a clear female voice."
    ),
    seed=103,
    tiny={"num_inference_steps": 4},
    tiny_model="port_kit.testing.tiny_fusion:tiny_fusion_model",
    trained_model="port_kit.testing.tiny_trained:trained_model",
    card="docs/ports/ovi.md",
)
