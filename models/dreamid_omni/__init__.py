"""DreamID-Omni: reference images, reference audios and a prompt to a video with audio."""

from __future__ import annotations

from port_kit.models.dreamid_omni.weights import COMPONENTS
from port_kit.port import Port

PORT = Port(
    name="dreamid_omni",
    title="DreamID-Omni: reference images, reference audios and a prompt to a 5 s video with audio",
    class_name="DreamIDOmniPipeline",
    pipeline="port_kit.models.dreamid_omni.pipeline:DreamIDOmniPipeline",
    output_type="video",
    references=("image", "audio"),
    recipe="port_kit.models.dreamid_omni.recipe:RECIPE",
    components=COMPONENTS,
    pre_process="get_pre_process_func",
    parity="port_kit.models.wan.parity.pipeline_cases:dreamid_cases",
    original="port_kit.models.dreamid_omni.recipe:ORIGINAL",
    parallel="port_kit.models.wan.parity.parallel_subjects:dreamid_omni_subject",
    request_options={
        "solver_name": "str",
        "video_negative_prompt": "str",
        "audio_negative_prompt": "str",
        "shift": "float",
        "video_cfg_scale": "float",
        "video_ref_cfg_scale": "float",
        "audio_cfg_scale": "float",
        "audio_ref_cfg_scale": "float",
    },
    example_prompt=(
        "<img1>: In the frame, a woman is identified as <sub1>. <img2>: In the frame, a man is identified as <sub2>. "
        "<sub1> and <sub2> sit at a table by a window. <sub1> smiles and says, <S>Hello there, my old friend.<E> "
        "<sub2> looks up and answers, <S>It has been far too long.<E>"
    ),
    seed=100,
    tiny={"height": 64, "width": 96, "num_inference_steps": 4},
    card="docs/ports/dreamid_omni.md",
    licences={
        "transformer": "research use only (DreamID-Omni's README)",
        "text_encoder, tokenizer, vae": "Apache-2.0 (Wan2.2)",
        "audio_vae, vocoder": "CC-BY-NC-4.0 (MMAudio)",
        "reference code": "Apache-2.0",
    },
)
