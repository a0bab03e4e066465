"""DreamID-Omni's constants with their units, and what a request may set, with the original's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from port_kit.errors import InputError
from port_kit.models.wan_fusion.inputs import (
    as_list,
    check_integer,
    check_names,
    check_real,
    check_size,
    check_text,
)
from port_kit.models.wan_fusion.inputs import field as prompt_field

VIDEO_LATENT_LENGTH = 31  # latent frames: 1 + 30 * 4 = 121 frames
AUDIO_LATENT_LENGTH = 157  # audio latents: 314 mel frames of 256 samples = 80,384 samples
VIDEO_TIME_STRIDE = 4  # frames a latent frame, after the first
VIDEO_LATENT_CHANNELS = 48
AUDIO_LATENT_CHANNELS = 20
VIDEO_SPATIAL_STRIDE = 16  # pixels a latent cell, each way
SIZE_MULTIPLE = 32  # pixels: the VAE's 16 times the transformer's patch of 2
MAX_SIDE = 4096  # pixels
FPS = 24  # frames a second
AUDIO_SAMPLE_RATE = 16_000  # Hz
MAX_TEXT_TOKENS = 512
#: Latents that one voice reference takes: 1 s = 16,000 samples = 62 mel frames = 31 latents.
VOICE_LATENT_LENGTH = 31
#: The audio tower reads at most 1024 tokens, references included.
MAX_REFERENCES = (1024 - AUDIO_LATENT_LENGTH) // VOICE_LATENT_LENGTH

DEFAULT_HEIGHT, DEFAULT_WIDTH = 704, 1280  # pixels
DEFAULT_STEPS = 50
DEFAULT_SHIFT = 5.0
DEFAULT_SEED = 100
DEFAULT_VIDEO_NEGATIVE_PROMPT = "jitter, bad hands, blur, distortion"
DEFAULT_AUDIO_NEGATIVE_PROMPT = "robotic, muffled, echo, distorted"


@dataclass(frozen=True)
class GuidanceScales:
    """How far a prediction is pushed, per modality: towards the text, and towards the references."""

    video_cfg_scale: float = 3.0
    video_ref_cfg_scale: float = 1.5
    audio_cfg_scale: float = 4.0
    audio_ref_cfg_scale: float = 2.0


@dataclass(frozen=True)
class GenerationRequest:
    """One checked request. References are still as the caller gave them.

    Attributes:
        prompt: may hold the model's markers (``<img1>``, ``<sub1>``, ``<S>..<E>``) and ``[TAG]`` blocks.
        images: reference pictures, one a person.
        voices: reference voices, the i-th is the i-th picture's.
        height: pixels, a multiple of :data:`SIZE_MULTIPLE`.
        width: the same.
        steps: denoising steps, four passes of the transformer each.
        shift: of the sigma schedule; larger spends more steps on coarse structure.
        seed: of both noise generators.
        video_noise, audio_noise: the initial latents in place of drawn ones, references' places included:
            (48, frames, height / 16, width / 16) and (tokens, 20); None draws them.
    """

    prompt: str
    images: tuple[Any, ...]
    voices: tuple[Any, ...]
    video_negative_prompt: str = DEFAULT_VIDEO_NEGATIVE_PROMPT
    audio_negative_prompt: str = DEFAULT_AUDIO_NEGATIVE_PROMPT
    height: int = DEFAULT_HEIGHT
    width: int = DEFAULT_WIDTH
    steps: int = DEFAULT_STEPS
    shift: float = DEFAULT_SHIFT
    seed: int = DEFAULT_SEED
    scales: GuidanceScales = field(default_factory=GuidanceScales)
    video_noise: Any = None
    audio_noise: Any = None


#: What ``extra_args`` may hold, beside vLLM-Omni's own names.
OPTIONS = (
    "video_negative_prompt",
    "audio_negative_prompt",
    "shift",
    "flow_shift",
    "video_cfg_scale",
    "video_ref_cfg_scale",
    "audio_cfg_scale",
    "audio_ref_cfg_scale",
    "video_noise",
    "audio_noise",
)


def parse_request(prompt: Any, sampling: Any, *, frames: int) -> GenerationRequest:
    """Check a request completely, references' contents aside.

    Args:
        prompt: ``{"prompt": text, "multi_modal_data": {"image": [...], "audio": [...]}}``, as vLLM-Omni takes it;
            ``negative_prompt`` in it is the video's.
        sampling: ``OmniDiffusionSamplingParams``; :data:`OPTIONS` travel in its ``extra_args``.
        frames: what the model makes; a request may name this number or none.

    Raises:
        InputError: with what was given, what is required and what to do.
    """
    options: Mapping[str, Any] = sampling.extra_args or {}
    check_names(options, OPTIONS)
    text = prompt if isinstance(prompt, str) else prompt_field(prompt, "prompt")
    images, voices = _references(prompt_field(prompt, "multi_modal_data") or {})
    height, width = check_size(
        DEFAULT_HEIGHT if sampling.height is None else sampling.height,
        DEFAULT_WIDTH if sampling.width is None else sampling.width,
        multiple=SIZE_MULTIPLE,
        maximum=MAX_SIDE,
    )
    _check_counts(sampling, frames)
    steps = DEFAULT_STEPS if sampling.num_inference_steps is None else sampling.num_inference_steps
    video_negative = options.get("video_negative_prompt", prompt_field(prompt, "negative_prompt"))
    return GenerationRequest(
        prompt=check_text("prompt", text, required=True),
        images=images,
        voices=voices,
        video_negative_prompt=_text_or("video_negative_prompt", video_negative, DEFAULT_VIDEO_NEGATIVE_PROMPT),
        audio_negative_prompt=_text_or(
            "audio_negative_prompt", options.get("audio_negative_prompt"), DEFAULT_AUDIO_NEGATIVE_PROMPT
        ),
        height=height,
        width=width,
        steps=check_integer("num_inference_steps", steps, minimum=1, maximum=1000),
        shift=check_real("shift", options.get("shift", options.get("flow_shift", DEFAULT_SHIFT)), positive=True),
        seed=DEFAULT_SEED if sampling.seed is None else check_integer("seed", sampling.seed, minimum=0),
        scales=_scales(sampling, options),
        video_noise=options.get("video_noise"),
        audio_noise=options.get("audio_noise"),
    )


def _references(data: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    if not isinstance(data, Mapping):
        raise InputError(f"multi_modal_data is {type(data).__name__}; a mapping is required", code="input_type")
    images, voices = tuple(as_list(data.get("image"))), tuple(as_list(data.get("audio")))
    for what, found in (("picture", images), ("voice", voices)):
        if not found:
            raise InputError(
                f"the request has no reference {what}; at least one picture and one voice are required",
                code="input_missing",
                hint='give them as multi_modal_data={"image": [...], "audio": [...]}',
            )
    if len(images) != len(voices):
        raise InputError(
            f"{len(images)} reference picture(s) and {len(voices)} voice(s); as many voices as pictures are required",
            code="input_count",
            hint="the i-th voice belongs to the i-th picture",
        )
    if len(images) > MAX_REFERENCES:
        raise InputError(f"{len(images)} references; at most {MAX_REFERENCES} are taken", code="input_count")
    return images, voices


def _check_counts(sampling: Any, frames: int) -> None:
    """Refuse what the model cannot do; vLLM-Omni fills in num_frames=1 where a request names none."""
    check_integer("num_outputs_per_prompt", sampling.num_outputs_per_prompt, minimum=1, maximum=1)
    if sampling.num_frames not in (None, 1, frames):
        raise InputError(
            f"num_frames is {sampling.num_frames}; this model makes {frames} frames",
            code="input_value",
            hint="leave num_frames out",
        )
    if sampling.fps not in (None, FPS):
        raise InputError(f"fps is {sampling.fps}; this model makes {FPS} frames a second", code="input_value")


def _text_or(name: str, value: object, default: str) -> str:
    return default if value is None else check_text(name, value)


def _scales(sampling: Any, options: Mapping[str, Any]) -> GuidanceScales:
    """Read the four scales; vLLM-Omni's ``guidance_scale``, where a request sets it, is the video's."""
    given = {name: options[name] for name in GuidanceScales.__dataclass_fields__ if options.get(name) is not None}
    if sampling.guidance_scale_provided and "video_cfg_scale" not in given:
        given["video_cfg_scale"] = sampling.guidance_scale
    return GuidanceScales(**{name: check_real(name, value) for name, value in given.items()})
