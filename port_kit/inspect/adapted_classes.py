"""Facts that a module tree does not contain: a transformer's diffusers pipeline and its smallest sizes.

A family here has been generated and tested completely. For any other class :mod:`port_kit.scaffold.diffusers_class`
reports the known and the unknown facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: Processors of diffusers whose arithmetic a template knows, and that template.
ATTENTION_TEMPLATES: Mapping[str, str] = {
    "LTXVideoAttnProcessor": "attention_across_heads.py",
    "AttnProcessor2_0": "attention_plain.py",
}
#: Modules of diffusers with two linears in a row and something element by element between them: the first is split by
#: output, the second by input. ``FeedForward`` only with an activation that keeps its width.
PAIRS: Mapping[str, tuple[str, str]] = {
    "FeedForward": ("net.0.proj", "net.2"),
    "PixArtAlphaTextProjection": ("linear_1", "linear_2"),
    "TimestepEmbedding": ("linear_1", "linear_2"),
}
#: Linears that make one vector a request into many: split by output, gathered at once.
GATHERED: Mapping[str, str] = {"AdaLayerNormSingle": "linear"}

#: Classes that pass the structural checks but are unsupported, with the reason.
KNOWN_OTHERWISE: Mapping[str, str] = {
    "DiTTransformer2DModel": "it is told the number of a class; the pipeline that is written reads a prompt",
    "PriorTransformer": "it predicts one embedding, not latents of a picture or video",
}


@dataclass(frozen=True)
class Part:
    """One tiny component beside the transformer.

    Attributes:
        module: module of its class.
        class_name: of diffusers or transformers.
        config: of the tiny one.
    """

    module: str
    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A diffusers pipeline around one transformer class.

    Attributes:
        transformer: the class in diffusers.
        pipeline: the class in diffusers.
        output: ``video`` or ``image``.
        repository: repository of the weights, as ``organisation/name``.
        tiny: ``transformer/config.json`` of a tiny model.
        parts: the pipeline's other components; a tokenizer has no class.
        vocabulary: entries of the tiny tokenizer.
        request: arguments of the pipeline for a tiny output.
        multiple: image sides are multiples of this, in pixels.
        height, width: defaults of the pipeline for videos, in pixels; the size of images follows from the transformer.
        steps, guidance: defaults of the pipeline.
        frames, fps: defaults of the pipeline; 0 for images.
        frame_step: a video has one frame and a multiple of this; 0 for images.
        least_steps: fewer than this many steps the schedule cannot make.
        callback: the argument of the call that has ``on_step`` called after each step.
    """

    transformer: str
    pipeline: str
    output: Literal["video", "image"]
    repository: str
    tiny: Mapping[str, Any]
    parts: Mapping[str, Part]
    vocabulary: int
    request: Mapping[str, Any]
    multiple: int
    steps: int
    guidance: float
    height: int = 0
    width: int = 0
    frames: int = 0
    fps: int = 0
    frame_step: int = 0
    least_steps: int = 1
    callback: str = "callback_on_step_end"


_TINY_T5 = {
    "vocab_size": 512,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}

FAMILIES: Mapping[str, Family] = {
    "LTXVideoTransformer3DModel": Family(
        transformer="LTXVideoTransformer3DModel",
        pipeline="LTXPipeline",
        output="video",
        repository="Lightricks/LTX-Video",
        tiny={
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 32,
        },
        parts={
            "vae": Part(
                "diffusers",
                "AutoencoderKLLTXVideo",
                {
                    "latent_channels": 8,
                    "block_out_channels": [8, 8, 8, 8],
                    "decoder_block_out_channels": [8, 8, 8, 8],
                    "layers_per_block": [1, 1, 1, 1, 1],
                    "decoder_layers_per_block": [1, 1, 1, 1, 1],
                    "decoder_causal": False,
                },
            ),
            "text_encoder": Part("transformers", "T5EncoderModel", _TINY_T5),
            "scheduler": Part(
                "diffusers",
                "FlowMatchEulerDiscreteScheduler",
                {
                    "use_dynamic_shifting": True,
                    "base_shift": 0.95,
                    "max_shift": 2.05,
                    "base_image_seq_len": 1024,
                    "max_image_seq_len": 4096,
                    "shift_terminal": 0.1,
                },
            ),
        },
        vocabulary=512,
        request={"height": 96, "width": 160, "num_frames": 17, "num_inference_steps": 2, "guidance_scale": 3.0},
        multiple=32,
        steps=50,
        guidance=3.0,
        height=512,
        width=704,
        frames=161,
        fps=25,
        frame_step=8,
        least_steps=2,  # its schedule is stretched to a last value, which needs a first one
    ),
    "PixArtTransformer2DModel": Family(
        transformer="PixArtTransformer2DModel",
        pipeline="PixArtSigmaPipeline",
        output="image",
        repository="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        tiny={
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": 32,
            "sample_size": 32,
            "use_additional_conditions": False,
        },
        parts={
            "vae": Part(
                "diffusers",
                "AutoencoderKL",
                {
                    "block_out_channels": [8, 8, 8, 8],
                    "down_block_types": ["DownEncoderBlock2D"] * 4,
                    "up_block_types": ["UpDecoderBlock2D"] * 4,
                    "latent_channels": 4,
                    "norm_num_groups": 4,
                },
            ),
            "text_encoder": Part("transformers", "T5EncoderModel", _TINY_T5),
            "scheduler": Part("diffusers", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        },
        vocabulary=512,
        request={"height": 64, "width": 96, "num_inference_steps": 2, "guidance_scale": 4.5},
        multiple=8,
        steps=20,
        guidance=4.5,
        callback="callback",
    ),
}
