"""Plain prompt requests: a prompt and a negative prompt, a size, a number of steps, a guidance scale and a seed.

A port states its defaults and limits as :class:`PromptOptions`. :func:`parse_prompt_request` checks a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from port_kit.errors import InputError
from port_kit.pipeline.inputs import (
    check_adapter,
    check_codec_options,
    check_integer,
    check_real,
    check_size,
    check_text,
)

#: Maximum number of outputs per request, the same as in vLLM-Omni's server.
MAX_OUTPUTS = 10
#: Maximum seed, so that the seeds of all outputs of a request are valid for a generator.
MAX_SEED = 2**63 - 1 - MAX_OUTPUTS


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Defaults and limits of a port's requests.

    Attributes:
        steps: denoising steps.
        min_steps: least number of steps that the schedule can make.
        guidance_scale: of the prompt, against the negative prompt.
        height, width: pixels.
        size_multiple: both sides are multiples of it, in pixels.
        max_side: pixels.
        frames: 1 for images.
        frame_step: a video has one frame and a multiple of this many.
        negative_prompt: of a request without one.
        seed: of a request without one.
        max_outputs: outputs per request.
    """

    steps: int
    guidance_scale: float
    height: int
    width: int
    size_multiple: int
    min_steps: int = 1
    max_side: int = 4096
    frames: int = 1
    frame_step: int = 1
    negative_prompt: str = ""
    seed: int = 0
    max_outputs: int = MAX_OUTPUTS


@dataclass(frozen=True)
class GuidanceScale:
    """Guidance scale of the prompt; 1 is the prediction for the prompt alone."""

    guidance_scale: float


@dataclass(frozen=True, kw_only=True)
class PromptRequest:
    """One checked request.

    Attributes:
        prompt: never blank.
        negative_prompt: may be empty.
        height, width: pixels.
        frames: 1 for images.
        steps: denoising steps.
        scales: the guidance scale.
        seed: of the first output; it increases by 1 per output.
        outputs: number of outputs.
    """

    prompt: str
    negative_prompt: str
    height: int
    width: int
    frames: int
    steps: int
    scales: GuidanceScale
    seed: int
    outputs: int = 1


def parse_prompt_request(prompt: Any, sampling: Any, options: PromptOptions) -> PromptRequest:
    """Check a request.

    Args:
        prompt: text, or a mapping with ``prompt`` and optionally ``negative_prompt``, vLLM-Omni's format.
        sampling: ``OmniDiffusionSamplingParams``.
        options: of the port.

    Raises:
        InputError: a field has an invalid value, or the request has reference media.
    """
    fields: Mapping[str, Any] = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
    if fields.get("multi_modal_data"):
        raise InputError("the request has reference media; this model accepts none", code="input_count")
    negative = fields.get("negative_prompt")
    height, width = _size(sampling, options)
    steps = options.steps if sampling.num_inference_steps is None else sampling.num_inference_steps
    scale = sampling.guidance_scale if sampling.guidance_scale_provided else options.guidance_scale
    seed = options.seed if sampling.seed is None else sampling.seed
    outputs = sampling.num_outputs_per_prompt
    check_adapter(getattr(sampling, "lora_request", None))
    check_codec_options((sampling.extra_args or {}).get("video_codec_options"))
    return PromptRequest(
        prompt=check_text("prompt", fields.get("prompt"), required=True),
        negative_prompt=options.negative_prompt if negative is None else check_text("negative_prompt", negative),
        height=height,
        width=width,
        frames=_frames(sampling.num_frames, options),
        steps=check_integer("num_inference_steps", steps, minimum=options.min_steps, maximum=1000),
        scales=GuidanceScale(check_real("guidance_scale", scale)),
        seed=check_integer("seed", seed, minimum=0, maximum=MAX_SEED),
        outputs=check_integer("num_outputs_per_prompt", outputs, minimum=1, maximum=options.max_outputs),
    )


def _size(sampling: Any, options: PromptOptions) -> tuple[int, int]:
    return check_size(
        options.height if sampling.height is None else sampling.height,
        options.width if sampling.width is None else sampling.width,
        multiple=options.size_multiple,
        maximum=options.max_side,
    )


def _frames(given: object, options: PromptOptions) -> int:
    """Return the number of frames; vLLM-Omni sets 1 if a request has none."""
    if given in (None, 1):
        return options.frames
    frames = check_integer("num_frames", given, minimum=1)
    if options.frames == 1:
        raise InputError(f"num_frames is {frames}; this model generates images", code="input_value", hint="omit it")
    if (frames - 1) % options.frame_step:
        low = frames - (frames - 1) % options.frame_step
        raise InputError(
            f"num_frames is {frames}; 1 and a multiple of {options.frame_step} are required",
            code="input_size",
            hint=f"use {low} or {low + options.frame_step}",
        )
    return frames
