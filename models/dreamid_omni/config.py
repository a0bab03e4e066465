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
GUIDANCE_PASSES = 4  # of the transformer, a step: full, without text, without pictures, without voices
#: Latents that one voice reference takes: 1 s = 16,000 samples = 62 mel frames = 31 latents.
VOICE_LATENT_LENGTH = 31
#: The audio tower reads at most 1024 tokens, references included.
MAX_REFERENCES = (1024 - AUDIO_LATENT_LENGTH) // VOICE_LATENT_LENGTH

DEFAULT_HEIGHT, DEFAULT_WIDTH = 704, 1280  # pixels
DEFAULT_STEPS = 50
DEFAULT_SHIFT = 5.0
DEFAULT_SOLVER = "unipc"
SOLVERS = ("unipc", "dpm++", "euler")
DEFAULT_SEED = 100
DEFAULT_VIDEO_NEGATIVE_PROMPT = "jitter, bad hands, blur, distortion"
DEFAULT_AUDIO_NEGATIVE_PROMPT = "robotic, muffled, echo, distorted"


@dataclass(frozen=True)
class Lengths:
    """How long a clip is, in latents, without references."""

    video: int
    audio: int

    @property
    def frames(self) -> int:
        """Frames that the video latents decode to."""
        return 1 + (self.video - 1) * VIDEO_TIME_STRIDE


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
        solver: one of :data:`SOLVERS`.
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
    solver: str = DEFAULT_SOLVER
    shift: float = DEFAULT_SHIFT
    seed: int = DEFAULT_SEED
    scales: GuidanceScales = field(default_factory=GuidanceScales)
    video_noise: Any = None
    audio_noise: Any = None

    def noise_shapes(self, lengths: Lengths) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of both initial latents, the references' places at the end included."""
        count, stride = len(self.images), VIDEO_SPATIAL_STRIDE
        return (
            (VIDEO_LATENT_CHANNELS, lengths.video + count, self.height // stride, self.width // stride),
            (lengths.audio + count * VOICE_LATENT_LENGTH, AUDIO_LATENT_CHANNELS),
        )


#: What ``extra_args`` may hold, beside vLLM-Omni's own names.
OPTIONS = (
    "video_negative_prompt",
    "audio_negative_prompt",
    "solver_name",
    "shift",
    "flow_shift",
    "video_cfg_scale",
    "video_ref_cfg_scale",
    "audio_cfg_scale",
    "audio_ref_cfg_scale",
    "video_noise",
    "audio_noise",
)


def parse_request(prompt: Any, sampling: Any, lengths: Lengths) -> GenerationRequest:
    """Check a request completely, references' contents aside.

    Args:
        prompt: ``{"prompt": text, "multi_modal_data": {"image": [...], "audio": [...]}}``, as vLLM-Omni takes it;
            its ``video_negative_prompt`` (or ``negative_prompt``) and ``audio_negative_prompt`` are read too.
        sampling: ``OmniDiffusionSamplingParams``; :data:`OPTIONS` travel in its ``extra_args``.
        lengths: of the clip that the model makes; a request may name its number of frames or none.

    Raises:
        InputError: with what was given, what is required and what to do.
    """
    options: Mapping[str, Any] = sampling.extra_args or {}
    check_names(options, OPTIONS)
    fields = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
    images, voices = _references(fields.get("multi_modal_data") or {})
    height, width = check_size(
        DEFAULT_HEIGHT if sampling.height is None else sampling.height,
        DEFAULT_WIDTH if sampling.width is None else sampling.width,
        multiple=SIZE_MULTIPLE,
        maximum=MAX_SIDE,
    )
    _check_counts(sampling, lengths.frames)
    steps = DEFAULT_STEPS if sampling.num_inference_steps is None else sampling.num_inference_steps
    request = GenerationRequest(
        prompt=check_text("prompt", fields.get("prompt"), required=True),
        images=images,
        voices=voices,
        video_negative_prompt=_negative("video", options, fields, DEFAULT_VIDEO_NEGATIVE_PROMPT),
        audio_negative_prompt=_negative("audio", options, fields, DEFAULT_AUDIO_NEGATIVE_PROMPT),
        height=height,
        width=width,
        steps=check_integer("num_inference_steps", steps, minimum=1, maximum=1000),
        solver=_solver(options.get("solver_name", DEFAULT_SOLVER)),
        shift=check_real("shift", options.get("shift", options.get("flow_shift", DEFAULT_SHIFT)), positive=True),
        seed=DEFAULT_SEED if sampling.seed is None else check_integer("seed", sampling.seed, minimum=0),
        scales=_scales(sampling, options),
        video_noise=options.get("video_noise"),
        audio_noise=options.get("audio_noise"),
    )
    for name, shape in zip(("video_noise", "audio_noise"), request.noise_shapes(lengths), strict=True):
        _check_noise(name, getattr(request, name), shape)
    return request


def _check_noise(name: str, noise: Any, shape: tuple[int, ...]) -> None:
    if noise is not None and tuple(getattr(noise, "shape", ())) != shape:
        found = tuple(getattr(noise, "shape", ())) or type(noise).__name__
        raise InputError(f"{name} is {found}; a tensor of shape {shape} is required", code="input_size")


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


def _negative(modality: str, options: Mapping[str, Any], fields: Mapping[str, Any], default: str) -> str:
    """Read a negative prompt from ``extra_args``, else from the prompt's own fields; empty text is allowed."""
    name = f"{modality}_negative_prompt"
    given = options.get(name, fields.get(name, fields.get("negative_prompt") if modality == "video" else None))
    return default if given is None else check_text(name, given)


def _solver(name: object) -> str:
    if name not in SOLVERS:
        raise InputError(
            f"solver_name is {name!r}; one of {', '.join(SOLVERS)} is required", code="input_value", hint="use unipc"
        )
    return str(name)


def _scales(sampling: Any, options: Mapping[str, Any]) -> GuidanceScales:
    """Read the four scales; vLLM-Omni's ``guidance_scale``, where a request sets it, is the video's."""
    given = {name: options[name] for name in GuidanceScales.__dataclass_fields__ if options.get(name) is not None}
    if sampling.guidance_scale_provided and "video_cfg_scale" not in given:
        given["video_cfg_scale"] = sampling.guidance_scale
    return GuidanceScales(**{name: check_real(name, value) for name, value in given.items()})
