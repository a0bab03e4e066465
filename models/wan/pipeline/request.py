"""Requests common to all ports of the family: options, units and the originals' defaults."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from port_kit.errors import InputError
from port_kit.escape import quoted
from port_kit.pipeline.guidance_gate import parse_guidance_gate
from port_kit.pipeline.inputs import (
    check_codec_options,
    check_integer,
    check_real,
    check_text,
    media_mapping,
    request_seed,
)

VIDEO_TIME_STRIDE = 4  # frames per latent frame, after the first
VIDEO_LATENT_CHANNELS = 48
AUDIO_LATENT_CHANNELS = 20
VIDEO_SPATIAL_STRIDE = 16  # pixels per latent cell, in height and width
SIZE_MULTIPLE = 32  # pixels: 16 of the VAE times 2 of the transformer's patches
MAX_SIDE = 4096  # pixels
FPS = 24  # frames per second
AUDIO_SAMPLE_RATE = 16_000  # Hz
MAX_TEXT_TOKENS = 512
MAX_LATENTS = 1024  # positions of either stream; published models have up to 314

#: Maximum number of videos per request, the same as in vLLM-Omni's server.
MAX_OUTPUTS = 10
#: Maximum seed, so that the seeds of all videos of a request are valid for a generator.
MAX_SEED = 2**63 - 1

DEFAULT_STEPS = 50
DEFAULT_SHIFT = 5.0
DEFAULT_SOLVER = "unipc"
SOLVERS = ("unipc", "dpm++", "euler")
DEFAULT_VIDEO_NEGATIVE_PROMPT = "jitter, bad hands, blur, distortion"
DEFAULT_AUDIO_NEGATIVE_PROMPT = "robotic, muffled, echo, distorted"

#: Options in ``extra_args`` that all ports accept, besides those on the command line.
MORE_OPTIONS = ("flow_shift", "video_noise", "audio_noise", "duration", "generate_sound")
#: Those that are tensors.
NOISES = ("video_noise", "audio_noise")

#: Options of vLLM-Omni's servers that have no effect on these models, with the reason.
NOT_READ = {
    "duration": "all clips of this model have the same length",
    "sound_duration": "the audio is as long as the video",
    "true_cfg_scale": "the options that end with cfg_scale guide this model",
}

# Ranges of magnitudes. The outputs of the tiny Ovi are finite at both ends of each, in float32; published settings
# are 1.5 to 7 for scales, 3 to 8 for the shift, and 20 to 50 steps.
MAX_SCALE = 100.0
MIN_SHIFT, MAX_SHIFT = 0.01, 100.0
MAX_STEPS = 1000  # those of the training schedule
#: Pixels per frame: twice the largest size that was published, 960x960 and 704x1280.
MAX_AREA = 2 * 960 * 960


@dataclass(frozen=True)
class LatentLengths:
    """Lengths of a clip in latents, without references."""

    video: int
    audio: int

    @property
    def frames(self) -> int:
        """Number of decoded frames."""
        return 1 + (self.video - 1) * VIDEO_TIME_STRIDE


@dataclass(frozen=True, kw_only=True)
class FusionRequest:
    """Checked fields of a request that all ports have.

    Attributes:
        prompt: text for the text encoder.
        height: pixels, a multiple of :data:`SIZE_MULTIPLE`.
        width: the same.
        steps: denoising steps.
        solver: one of :data:`SOLVERS`.
        shift: of the sigma schedule; a larger shift spends more steps on coarse structure.
        seed: of both noise generators, for the first video of the request.
        scales: the port's guidance scales, a dataclass of floats; the first is the video's scale for the text.
        outputs: number of videos; the seed increases by 1 per video.
        guidance_gate_step: first step that runs one guidance branch only (:mod:`~port_kit.pipeline.guidance_gate`);
            None for none.
        video_noise, audio_noise: initial latents, positions of references included:
            (48, frames, height / 16, width / 16) and (tokens, 20); None to draw them.
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
    guidance_gate_step: int | None = None
    video_noise: Any = None
    audio_noise: Any = None

    @property
    def reference_lengths(self) -> LatentLengths:
        """Numbers of latents that references occupy after those of the clip."""
        return LatentLengths(0, 0)

    def noise_shapes(self, lengths: LatentLengths) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of both initial latents, positions of references included."""
        more, stride = self.reference_lengths, VIDEO_SPATIAL_STRIDE
        return (
            (VIDEO_LATENT_CHANNELS, lengths.video + more.video, self.height // stride, self.width // stride),
            (lengths.audio + more.audio, AUDIO_LATENT_CHANNELS),
        )

    def check_noise(self, lengths: LatentLengths) -> None:
        """Raise InputError if given noise is not a finite tensor of the shape of :meth:`noise_shapes`."""
        for name, shape in zip(NOISES, self.noise_shapes(lengths), strict=True):
            noise = getattr(self, name)
            if noise is not None:
                _check_noise(name, noise, shape)


def _check_noise(name: str, noise: Any, shape: tuple[int, ...]) -> None:
    import torch

    if not isinstance(noise, torch.Tensor):
        raise InputError(f"{name} is {type(noise).__name__}; expected a tensor of shape {shape}", code="input_size")
    if tuple(noise.shape) != shape:
        raise InputError(f"{name} is {tuple(noise.shape)}; expected a tensor of shape {shape}", code="input_size")
    if noise.layout is not torch.strided or not noise.is_floating_point() or noise.is_meta:
        kind = f"{noise.dtype}, {noise.layout}, on {noise.device}"
        raise InputError(f"{name} is {kind}; a dense tensor of floats is required", code="input_type")
    if not bool(noise.isfinite().all()):
        raise InputError(f"{name} has values that are not finite", code="input_value", hint=f"correct {name}")


def prompt_fields(prompt: Any) -> Mapping[str, Any]:
    """Return a prompt as a mapping; a text becomes its ``prompt`` field."""
    return prompt if isinstance(prompt, Mapping) else {"prompt": prompt}


def media_of(fields: Mapping[str, Any], kinds: Collection[str] = ("image", "audio")) -> Mapping[str, Any]:
    """Return ``multi_modal_data`` of a prompt, empty if it has none.

    Args:
        fields: the prompt.
        kinds: kinds of media that the port accepts.

    Raises:
        InputError: it is not a mapping, or has media of another kind.
    """
    media = media_mapping(fields)
    for kind, given in media.items():
        if kind not in kinds and given is not None:
            accepted = ", ".join(kinds) or "none"
            raise InputError(
                f"the request has a reference of the kind {quoted(kind)}; this model accepts {accepted}",
                code="input_value",
                hint="leave it out",
            )
    return media


def parse_common(
    fields: Mapping[str, Any], sampling: Any, lengths: LatentLengths, *, scales: Any, seed: int
) -> dict[str, Any]:
    """Check the fields that all ports have.

    Args:
        fields: the prompt; its ``video_negative_prompt`` (or ``negative_prompt``) and ``audio_negative_prompt`` are
            used if ``extra_args`` has none.
        sampling: ``OmniDiffusionSamplingParams``.
        lengths: of the clip; if a request sets the number of frames, it must match.
        scales: the port's dataclass of guidance scales; its fields are options too.
        seed: default of the port.

    Returns:
        Fields of :class:`FusionRequest` except height and width.

    Raises:
        InputError: a field has an invalid value, or contradicts another one.
    """
    given: Mapping[str, Any] = sampling.extra_args or {}
    check_codec_options(given.get("video_codec_options"))
    _check_sound(given.get("generate_sound"))
    _check_counts(sampling, given, lengths.frames)
    steps = DEFAULT_STEPS if sampling.num_inference_steps is None else sampling.num_inference_steps
    steps = check_integer("num_inference_steps", steps, minimum=1, maximum=MAX_STEPS)
    return {
        "prompt": check_text("prompt", fields.get("prompt"), required=True),
        "video_negative_prompt": _negative("video", given, fields, DEFAULT_VIDEO_NEGATIVE_PROMPT),
        "audio_negative_prompt": _negative("audio", given, fields, DEFAULT_AUDIO_NEGATIVE_PROMPT),
        "steps": steps,
        "solver": _solver(given.get("solver_name", DEFAULT_SOLVER)),
        "shift": _shift(given),
        "seed": request_seed(sampling, seed, maximum=MAX_SEED),
        "outputs": _outputs(sampling, given),
        "guidance_gate_step": parse_guidance_gate(given, steps),
        "scales": _scales(scales, sampling, given),
        "video_noise": given.get("video_noise"),
        "audio_noise": given.get("audio_noise"),
    }


def _check_sound(given: object) -> None:
    if given not in (None, True) or isinstance(given, int) is not isinstance(given, bool):
        raise InputError(
            f"generate_sound is {quoted(given)}; this model always generates audio",
            code="input_value",
            hint="omit generate_sound, and remove the audio track afterwards",
        )


def _check_counts(sampling: Any, options: Mapping[str, Any], frames: int) -> None:
    """Check the length and the frame rate.

    vLLM-Omni sets num_frames to 1 if a request has none, and to ``duration`` times the frame rate if it has one.
    """
    counts = [None, 1, frames]
    seconds = (frames - 1) / FPS
    if (duration := options.get("duration")) is not None:
        if check_real("duration", duration) != seconds:
            raise InputError(
                f"duration is {quoted(duration)}; this model generates {seconds:g} s",
                code="input_value",
                hint="omit duration (seconds, in requests to a server)",
            )
        counts.append(frames - 1)
    if sampling.num_frames not in counts or isinstance(sampling.num_frames, bool):
        raise InputError(
            f"num_frames is {quoted(sampling.num_frames)}; this model generates {frames} frames",
            code="input_value",
            hint=f"omit num_frames (in requests to a server, seconds may be {seconds:g})",
        )


def _shift(options: Mapping[str, Any]) -> float:
    """Read the shift of the sigma schedule, under its own name or under that of vLLM-Omni."""
    given = {name: options[name] for name in ("shift", "flow_shift") if name in options}
    return check_real("shift", _only(given, DEFAULT_SHIFT), minimum=MIN_SHIFT, maximum=MAX_SHIFT)


def _only(given: Mapping[str, Any], default: Any) -> Any:
    """Return the value of names that set the same; refuse two values."""
    (first, value), *others = given.items() or [("", default)]
    for name, other in others:
        if other != value:
            raise InputError(
                f"{first} is {quoted(value)} and {name} is {quoted(other)}; they set the same",
                code="input_value",
                hint=f"leave {name} out",
            )
    return value


def _outputs(sampling: Any, options: Mapping[str, Any]) -> int:
    count = check_integer("num_outputs_per_prompt", sampling.num_outputs_per_prompt, minimum=1, maximum=MAX_OUTPUTS)
    given = [name for name in ("video_noise", "audio_noise") if options.get(name) is not None]
    if count > 1 and given:
        raise InputError(
            f"num_outputs_per_prompt is {count} and {given[0]} is given; all videos would start from the same noise",
            code="input_value",
            hint="send one request per noise",
        )
    return count


def _negative(modality: str, options: Mapping[str, Any], fields: Mapping[str, Any], default: str) -> str:
    """Read a negative prompt from ``extra_args``, else from the fields of the prompt; an empty text is valid."""
    name = f"{modality}_negative_prompt"
    given = {f"{name} of extra_args": options.get(name), f"{name} of the prompt": fields.get(name)}
    if modality == "video":
        given["negative_prompt"] = fields.get("negative_prompt")
    found = _only({key: value for key, value in given.items() if value is not None}, None)
    return default if found is None else check_text(name, found)


def _solver(name: object) -> str:
    if name not in SOLVERS:
        raise InputError(
            f"solver_name is {quoted(name)}; expected one of {', '.join(SOLVERS)}", code="input_value", hint="use unipc"
        )
    return str(name)


def _scales(kind: Any, sampling: Any, options: Mapping[str, Any]) -> Any:
    """Read the port's scales; vLLM-Omni's ``guidance_scale``, if set, is the first, the video's."""
    names = tuple(kind.__dataclass_fields__)
    given = {name: options[name] for name in names if options.get(name) is not None}
    if sampling.guidance_scale_provided:
        first = {name: given[name] for name in names[:1] if name in given}
        given[names[0]] = _only({**first, "guidance_scale": sampling.guidance_scale}, None)
    check = partial(check_real, minimum=-MAX_SCALE, maximum=MAX_SCALE)
    return kind(**{name: check(name, value) for name, value in given.items()})
