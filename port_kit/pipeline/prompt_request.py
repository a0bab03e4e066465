"""Prompt requests: prompts, reference images, a size or a length, steps, a guidance scale and a seed.

A port states its defaults and limits as :class:`PromptOptions`. :func:`parse_prompt_request` checks a request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from port_kit.errors import InputError, PortKitError
from port_kit.escape import quoted, shortened
from port_kit.pipeline.inputs import (
    as_list,
    check_codec_options,
    check_integer,
    check_real,
    check_size,
    check_text,
    check_unused,
    media_mapping,
    request_seed,
)
from port_kit.port import SERVER_OPTIONS

if TYPE_CHECKING:
    from PIL import Image

#: Maximum number of outputs per request, the same as in vLLM-Omni's server.
MAX_OUTPUTS = 10
#: Maximum seed, so that the seeds of all outputs of a request are valid for a generator.
MAX_SEED = 2**63 - 1 - MAX_OUTPUTS

#: Largest guidance scale, in either direction, and number of steps; published settings are a tenth of them.
MAX_SCALE, MAX_STEPS = 100.0, 1000

#: Options in ``extra_args`` that set the length of audio, in seconds, as ``/v1/audio/generate`` sends them.
AUDIO_LENGTH, AUDIO_START, AUDIO_END = LENGTH_OPTIONS = SERVER_OPTIONS["audio"]


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Defaults and limits of a port's requests.

    Images and videos have a size, ``height`` and ``width``; audio alone has a length, ``seconds``.

    Attributes:
        steps: denoising steps.
        min_steps: least number of steps that the schedule can make.
        guidance_scale: of the prompt, against the negative prompt.
        height, width: pixels; 0 for audio alone.
        size_multiple: both sides are multiples of it, in pixels.
        max_side: pixels.
        max_area: pixels, of ``height`` times ``width``; default: four times that of the default size.
        frames: 1 for images.
        frame_step: a video has one frame and a multiple of this many.
        max_frames: default: four times ``frames``.
        seconds: length of audio alone; 0 for images and videos.
        max_seconds: longest audio that a request may ask for.
        negative_prompt: of a request without one.
        seed: of a request without one.
        max_outputs: outputs per request.
        images: reference images that every request has.
        size_of_image: a request without a size gets that of its first image; else the default size.
    """

    steps: int
    guidance_scale: float
    height: int = 0
    width: int = 0
    size_multiple: int = 1
    min_steps: int = 1
    max_side: int = 4096
    max_area: int = 0
    frames: int = 1
    frame_step: int = 1
    max_frames: int = 0
    seconds: float = 0.0
    max_seconds: float = 60.0
    negative_prompt: str = ""
    seed: int = 0
    max_outputs: int = MAX_OUTPUTS
    images: int = 0
    size_of_image: bool = True

    def __post_init__(self) -> None:
        if bool(self.height and self.width) == bool(self.seconds):
            raise PortKitError(
                f"PromptOptions has height {self.height}, width {self.width} and seconds {self.seconds}",
                code="port_invalid",
                hint="give height and width for images and videos, or seconds for audio alone",
            )
        object.__setattr__(self, "max_area", self.max_area or 4 * self.height * self.width)
        object.__setattr__(self, "max_frames", self.max_frames or 4 * self.frames)


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
        height, width: pixels; 0 for audio alone.
        frames: 1 for images.
        seconds: length of audio alone; 0 for images and videos.
        steps: denoising steps.
        scales: the guidance scale.
        seed: of the first output; it increases by 1 per output.
        outputs: number of outputs.
        images: reference images in RGB, in their own sizes.
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
    seconds: float = 0.0
    images: tuple[Image.Image, ...] = ()


def parse_prompt_request(prompt: Any, sampling: Any, options: PromptOptions) -> PromptRequest:
    """Check a request.

    Args:
        prompt: text, or a mapping with ``prompt`` and optionally ``negative_prompt``, vLLM-Omni's format.
        sampling: ``OmniDiffusionSamplingParams``.
        options: of the port.

    Raises:
        InputError: a field has an invalid value, or the reference media are not those of the options.
    """
    fields: Mapping[str, Any] = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
    images = _images(media_mapping(fields), options)
    negative = fields.get("negative_prompt")
    height, width = _size(sampling, options, images)
    steps = options.steps if sampling.num_inference_steps is None else sampling.num_inference_steps
    scale = sampling.guidance_scale if sampling.guidance_scale_provided else options.guidance_scale
    extra = sampling.extra_args or {}
    outputs = sampling.num_outputs_per_prompt
    check_codec_options(extra.get("video_codec_options"))
    return PromptRequest(
        prompt=check_text("prompt", fields.get("prompt"), required=True),
        negative_prompt=options.negative_prompt if negative is None else check_text("negative_prompt", negative),
        height=height,
        width=width,
        frames=_frames(sampling.num_frames, options),
        steps=check_integer("num_inference_steps", steps, minimum=options.min_steps, maximum=MAX_STEPS),
        scales=GuidanceScale(check_real("guidance_scale", scale, minimum=-MAX_SCALE, maximum=MAX_SCALE)),
        seed=request_seed(sampling, options.seed, maximum=MAX_SEED),
        outputs=check_integer("num_outputs_per_prompt", outputs, minimum=1, maximum=options.max_outputs),
        seconds=_seconds(extra, options),
        images=images,
    )


def _images(media: Mapping[str, Any], options: PromptOptions) -> tuple[Image.Image, ...]:
    """Return the decoded reference images of a request."""
    from port_kit.pipeline.images import load_image

    counts = {kind: len(as_list(given)) for kind, given in media.items()}
    images = as_list(media.get("image"))
    if len(images) != options.images or sum(counts.values()) != options.images:
        found = shortened(" and ".join(f"{count} of {quoted(kind)}" for kind, count in counts.items())) or "none"
        raise InputError(
            f"reference media of the request: {found}; this model takes {options.images or 'no'} reference images",
            code="input_count",
            hint=f"give {options.images} as image in multi_modal_data" if options.images else "leave them out",
        )
    return tuple(load_image(image, name=f"image {index}") for index, image in enumerate(images, 1))


def _size(sampling: Any, options: PromptOptions, images: tuple[Image.Image, ...]) -> tuple[int, int]:
    """Return height and width: of the request; else of its first image, rounded down; else the defaults."""
    if images and options.size_of_image and sampling.height is None and sampling.width is None:
        width, height = images[0].size
        area = math.sqrt(options.max_area / (height * width))
        shrink, multiple = min(1.0, options.max_side / max(height, width), area), options.size_multiple
        rounded = [max(1, int(side * shrink) // multiple) * multiple for side in (height, width)]
        return rounded[0], rounded[1]
    if options.seconds:
        given = {"height": sampling.height, "width": sampling.width}
        check_unused(given, dict.fromkeys(given, "this model makes audio, which has no size"))
        return 0, 0
    return check_size(
        options.height if sampling.height is None else sampling.height,
        options.width if sampling.width is None else sampling.width,
        multiple=options.size_multiple,
        maximum=options.max_side,
        area=options.max_area,
    )


def _seconds(extra: Mapping[str, Any], options: PromptOptions) -> float:
    """Return the length of audio alone in seconds: that of the request, or the default."""
    if not options.seconds:
        return 0.0
    start, length = extra.get(AUDIO_START) or 0.0, extra.get(AUDIO_LENGTH)
    if start:
        check_unused(extra, {AUDIO_START: "the audio of this model starts at 0"})
    if length is None:
        length = options.seconds if extra.get(AUDIO_END) is None else extra[AUDIO_END]
    seconds = check_real(AUDIO_LENGTH, length, positive=True)
    if seconds > options.max_seconds:
        raise InputError(
            f"{AUDIO_LENGTH} is {seconds:g} s; at most {options.max_seconds:g} s are made",
            code="input_value",
            hint=f"use {AUDIO_LENGTH}={options.max_seconds:g} or less",
            option=AUDIO_LENGTH,
        )
    return seconds


def _frames(given: object, options: PromptOptions) -> int:
    """Return the number of frames; vLLM-Omni sets 1 if a request has none."""
    if given in (None, 1):
        return options.frames
    frames = check_integer("num_frames", given, minimum=1)
    if options.frames > 1:
        check_integer("num_frames", given, minimum=1, maximum=options.max_frames)
    else:
        kind = "audio" if options.seconds else "images"
        raise InputError(f"num_frames is {frames}; this model generates {kind}", code="input_value", hint="omit it")
    if (frames - 1) % options.frame_step:
        low = frames - (frames - 1) % options.frame_step
        raise InputError(
            f"num_frames is {frames}; 1 and a multiple of {options.frame_step} are required",
            code="input_size",
            hint=f"use {low} or {low + options.frame_step}",
        )
    return frames
