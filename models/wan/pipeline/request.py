"""What a request of any port of the family may say, its units and the originals' defaults."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from port_kit.errors import InputError
from port_kit.pipeline.inputs import (
    check_adapter,
    check_codec_options,
    check_integer,
    check_names,
    check_real,
    check_text,
    check_unused,
)

VIDEO_TIME_STRIDE = 4  # frames a latent frame, after the first
VIDEO_LATENT_CHANNELS = 48
AUDIO_LATENT_CHANNELS = 20
VIDEO_SPATIAL_STRIDE = 16  # pixels a latent cell, each way
SIZE_MULTIPLE = 32  # pixels: the VAE's 16 times the transformer's patch of 2
MAX_SIDE = 4096  # pixels
FPS = 24  # frames a second
AUDIO_SAMPLE_RATE = 16_000  # Hz
MAX_TEXT_TOKENS = 512

#: Videos of one request; vLLM-Omni's server takes no more either.
MAX_OUTPUTS = 10
#: Above this the seed of a request's last video might be none that a generator takes.
MAX_SEED = 2**63 - 1

DEFAULT_STEPS = 50
DEFAULT_SHIFT = 5.0
DEFAULT_SOLVER = "unipc"
SOLVERS = ("unipc", "dpm++", "euler")
DEFAULT_VIDEO_NEGATIVE_PROMPT = "jitter, bad hands, blur, distortion"
DEFAULT_AUDIO_NEGATIVE_PROMPT = "robotic, muffled, echo, distorted"

#: What ``extra_args`` may hold for every port, beside vLLM-Omni's own names.
COMMON_OPTIONS = (
    "video_negative_prompt",
    "audio_negative_prompt",
    "solver_name",
    "shift",
    "flow_shift",
    "video_noise",
    "audio_noise",
)

#: Fields of vLLM-Omni's video API that would change nothing, with what is done instead.
_UNUSED = {
    "short_edge": "height and width alone decide the size",
    "sound_duration": "the audio is as long as the video",
    "start_time_seconds": "this model reads no reference video",
    "enable_frame_interpolation": "this model interpolates no frames",
    "quality": "num_inference_steps alone decides the quality",
    "boundary_ratio": "this model has one transformer",
    "true_cfg_scale": "the options that end with cfg_scale guide this model",
}


@dataclass(frozen=True)
class LatentLengths:
    """How long a clip is, in latents, without references."""

    video: int
    audio: int

    @property
    def frames(self) -> int:
        """Frames that the video latents decode to."""
        return 1 + (self.video - 1) * VIDEO_TIME_STRIDE


@dataclass(frozen=True, kw_only=True)
class FusionRequest:
    """One checked request, as far as all ports have it.

    Attributes:
        prompt: what the text encoder reads.
        height: pixels, a multiple of :data:`SIZE_MULTIPLE`.
        width: the same.
        steps: denoising steps.
        solver: one of :data:`SOLVERS`.
        shift: of the sigma schedule; larger spends more steps on coarse structure.
        seed: of both noise generators; of a request's first video, where it asks for several.
        scales: the port's guidance scales, a dataclass of floats; the first is the video's towards the text.
        outputs: how many videos are made; each after the first has the seed before it plus 1.
        video_noise, audio_noise: the initial latents in place of drawn ones, references' places included:
            (48, frames, height / 16, width / 16) and (tokens, 20); None draws them.
    """

    prompt: str
    height: int
    width: int
    scales: Any
    seed: int
    video_negative_prompt: str = DEFAULT_VIDEO_NEGATIVE_PROMPT
    audio_negative_prompt: str = DEFAULT_AUDIO_NEGATIVE_PROMPT
    steps: int = DEFAULT_STEPS
    solver: str = DEFAULT_SOLVER
    shift: float = DEFAULT_SHIFT
    outputs: int = 1
    video_noise: Any = None
    audio_noise: Any = None

    @property
    def reference_lengths(self) -> LatentLengths:
        """Places that references take behind the clip's own latents."""
        return LatentLengths(0, 0)

    def noise_shapes(self, lengths: LatentLengths) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of both initial latents, the references' places at the end included."""
        more, stride = self.reference_lengths, VIDEO_SPATIAL_STRIDE
        return (
            (VIDEO_LATENT_CHANNELS, lengths.video + more.video, self.height // stride, self.width // stride),
            (lengths.audio + more.audio, AUDIO_LATENT_CHANNELS),
        )

    def check_noise(self, lengths: LatentLengths) -> None:
        """Raise InputError where given noise has another shape than :meth:`noise_shapes`."""
        for name, shape in zip(("video_noise", "audio_noise"), self.noise_shapes(lengths), strict=True):
            noise = getattr(self, name)
            if noise is not None and tuple(getattr(noise, "shape", ())) != shape:
                found = tuple(getattr(noise, "shape", ())) or type(noise).__name__
                raise InputError(f"{name} is {found}; a tensor of shape {shape} is required", code="input_size")


def prompt_fields(prompt: Any) -> Mapping[str, Any]:
    """Return a prompt as a mapping, also where it is a plain text."""
    return prompt if isinstance(prompt, Mapping) else {"prompt": prompt}


def media_of(fields: Mapping[str, Any], kinds: Collection[str] = ("image", "audio")) -> Mapping[str, Any]:
    """Return ``multi_modal_data`` of a prompt, empty where it has none.

    Args:
        fields: the prompt.
        kinds: of media that the port reads.

    Raises:
        InputError: it is no mapping, or holds media of another kind, which would be ignored silently.
    """
    media = fields.get("multi_modal_data") or {}
    if not isinstance(media, Mapping):
        raise InputError(f"multi_modal_data is {type(media).__name__}; a mapping is required", code="input_type")
    for kind, given in media.items():
        if kind not in kinds and given is not None:
            raise InputError(
                f"the request has a reference of the kind {kind!r}; this model reads {', '.join(kinds) or 'none'}",
                code="input_value",
                hint="leave it out",
            )
    return media


def parse_common(
    fields: Mapping[str, Any], sampling: Any, lengths: LatentLengths, *, scales: Any, options: Iterable[str], seed: int
) -> dict[str, Any]:
    """Check what all ports have in common.

    Args:
        fields: the prompt; its ``video_negative_prompt`` (or ``negative_prompt``) and ``audio_negative_prompt`` are
            read where ``extra_args`` has none.
        sampling: ``OmniDiffusionSamplingParams``; :data:`COMMON_OPTIONS` travel in its ``extra_args``.
        lengths: of the clip that the model makes; a request may name its number of frames or none.
        scales: the port's dataclass of guidance scales; its fields are options too.
        options: further names that the port takes.
        seed: where the request has none.

    Returns:
        Fields of :class:`FusionRequest`, height and width aside.

    Raises:
        InputError: with what was given, what is required and what to do.
    """
    given: Mapping[str, Any] = sampling.extra_args or {}
    check_names(given, (*COMMON_OPTIONS, *scales.__dataclass_fields__, *options))
    _check_unused(sampling, given)
    check_adapter(getattr(sampling, "lora_request", None))
    _check_counts(sampling, lengths.frames)
    steps = DEFAULT_STEPS if sampling.num_inference_steps is None else sampling.num_inference_steps
    return {
        "prompt": check_text("prompt", fields.get("prompt"), required=True),
        "video_negative_prompt": _negative("video", given, fields, DEFAULT_VIDEO_NEGATIVE_PROMPT),
        "audio_negative_prompt": _negative("audio", given, fields, DEFAULT_AUDIO_NEGATIVE_PROMPT),
        "steps": check_integer("num_inference_steps", steps, minimum=1, maximum=1000),
        "solver": _solver(given.get("solver_name", DEFAULT_SOLVER)),
        "shift": check_real("shift", given.get("shift", given.get("flow_shift", DEFAULT_SHIFT)), positive=True),
        "seed": seed if sampling.seed is None else check_integer("seed", sampling.seed, minimum=0, maximum=MAX_SEED),
        "outputs": _outputs(sampling, given),
        "scales": _scales(scales, sampling, given),
        "video_noise": given.get("video_noise"),
        "audio_noise": given.get("audio_noise"),
    }


def _check_unused(sampling: Any, options: Mapping[str, Any]) -> None:
    fields = {name: getattr(sampling, name, None) for name in _UNUSED if name not in options}
    check_unused({**options, **fields}, _UNUSED)
    check_codec_options(options.get("video_codec_options"))
    if options.get("generate_sound") is False:
        raise InputError(
            "generate_sound is false; this model makes the audio together with the video",
            code="input_value",
            hint="leave generate_sound out, and drop the audio track afterwards",
        )


def _check_counts(sampling: Any, frames: int) -> None:
    """Refuse what the models cannot do; vLLM-Omni fills in num_frames=1 where a request names none."""
    if sampling.num_frames not in (None, 1, frames):
        raise InputError(
            f"num_frames is {sampling.num_frames}; this model makes {frames} frames",
            code="input_value",
            hint="leave num_frames (on a server also seconds) out",
        )
    if sampling.fps not in (None, FPS):
        raise InputError(f"fps is {sampling.fps}; this model makes {FPS} frames a second", code="input_value")


def _outputs(sampling: Any, options: Mapping[str, Any]) -> int:
    count = check_integer("num_outputs_per_prompt", sampling.num_outputs_per_prompt, minimum=1, maximum=MAX_OUTPUTS)
    given = [name for name in ("video_noise", "audio_noise") if options.get(name) is not None]
    if count > 1 and given:
        raise InputError(
            f"num_outputs_per_prompt is {count} and {given[0]} is given; all videos would begin with the same noise",
            code="input_value",
            hint="send one request for each noise",
        )
    return count


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


def _scales(kind: Any, sampling: Any, options: Mapping[str, Any]) -> Any:
    """Read the port's scales; vLLM-Omni's ``guidance_scale``, where a request sets it, is the first, the video's."""
    names = tuple(kind.__dataclass_fields__)
    given = {name: options[name] for name in names if options.get(name) is not None}
    if sampling.guidance_scale_provided and names[0] not in given:
        given[names[0]] = sampling.guidance_scale
    return kind(**{name: check_real(name, value) for name, value in given.items()})
