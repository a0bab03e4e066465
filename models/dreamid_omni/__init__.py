"""DreamID-Omni: reference images, reference audios and a prompt to a video with audio."""

from __future__ import annotations

from port_kit.models.dreamid_omni.weights import COMPONENTS
from port_kit.models.wan.pipeline.request import MORE_OPTIONS
from port_kit.port import Port

PORT = Port(
    name="dreamid_omni",
    package=__name__,
    title="DreamID-Omni: reference images, reference audios and a prompt to a 5 s video with audio",
    class_name="DreamIDOmniPipeline",
    output_type="video",
    guidance_branches=4,  # complete, without text, without images, without audio
    references=("image", "audio"),
    components=COMPONENTS,
    parity="port_kit.models.wan.parity.pipeline_cases:dreamid_cases",
    request_options={
        "solver_name": "str",
        "video_negative_prompt": "str",
        "audio_negative_prompt": "str",
        "shift": "float",
        "guidance_gate_step": "int",
        "video_cfg_scale": "float",
        "video_ref_cfg_scale": "float",
        "audio_cfg_scale": "float",
        "audio_ref_cfg_scale": "float",
    },
    more_options=MORE_OPTIONS,
    example_prompt=(
        "<img1>: In the frame, a woman is identified as <sub1>. <img2>: In the frame, a man is identified as <sub2>. "
        "<sub1> and <sub2> sit at a table by a window. <sub1> smiles and says, <S>Hello there, my old friend.<E> "
        "<sub2> looks up and answers, <S>It has been far too long.<E>"
    ),
    seed=100,
    tiny={"height": 64, "width": 96, "num_inference_steps": 4},
    tiny_model="port_kit.testing.tiny_fusion:tiny_fusion_model",
    card="docs/ports/dreamid_omni.md",
)
