"""From a request of vLLM-Omni to the arguments of a diffusers pipeline's call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from port_kit.errors import InputError
from port_kit.escape import quoted
from port_kit.pipeline.admission import READ, check_sampling, unknown_name
from port_kit.pipeline.inputs import check_integer, check_real
from port_kit.pipeline.prompt_request import AUDIO_END, AUDIO_LENGTH, AUDIO_START, MAX_OUTPUTS
from port_kit.references import check_image, to_rgb

#: Sampling parameters with the same name in diffusers; None is not given.
_SAMPLING = (
    "height",
    "width",
    "num_inference_steps",
    "true_cfg_scale",
    "max_sequence_length",
    "strength",
    "sigmas",
    "frame_rate",
    "latents",
)
#: Sampling parameters with a default value, which is not given.
_DEFAULTS = {"num_frames": 1, "guidance_rescale": 0.0, "eta": 0.0}
#: Sampling parameters that vLLM-Omni fills in, with a flag if the request gives them.
_FLAGGED = ("guidance_scale", "guidance_scale_2")
#: Names of the media of a request in diffusers, in order of preference.
MEDIA = {
    "image": ("image", "images", "input_images"),
    "video": ("video",),
    "audio": ("audio", "initial_audio_waveforms", "src_audio"),
}
#: Parameters for the length of audio in seconds, of which a pipeline has one at most; a request says ``audio_length``.
LENGTHS = ("audio_end_in_s", "audio_length_in_s", "audio_duration")
# Bounds of all pipelines: the largest published images are 4096x4096, the largest videos 3840x2160 with 129 frames.
MAX_SIDE, MAX_FRAMES, MAX_PIXELS = 8192, 1024, 2**30
MAX_STEPS = 1000
#: Largest number of any other parameter, such as a guidance scale or a length in seconds, in either direction.
MAX_NUMBER = 1e4
#: Sampling parameters that become arguments of the call.
_READ = READ - {"lora_request", "lora_scale"} | {*_SAMPLING, *_FLAGGED, *_DEFAULTS, "output_type", "generator_device"}
_REASONS = {
    "lora_request": "hosted pipelines apply no LoRA of a request",
    "lora_scale": "hosted pipelines apply no LoRA of a request",
}
#: Parameters of calls that ``extra_args`` must not set.
_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
_FIXED = ("prompt", "negative_prompt", "generator", "output_type", "return_dict", "latents")
_RESERVED = frozenset((*_FIXED, *_COUNTS)).union(*MEDIA.values())


def call_arguments(
    prompt: Any, sampling: Any, parameters: Mapping[str, Any], device: torch.device | None
) -> dict[str, Any]:
    """Return the arguments of the call.

    Args:
        prompt: text, or a dict with ``prompt``, ``negative_prompt`` and ``multi_modal_data``.
        sampling: ``OmniDiffusionSamplingParams``; ``extra_args`` are arguments of the call.
        parameters: parameters of the pipeline's call.
        device: the rank's device; None to check a request whose seed is not drawn yet, without a generator.

    Raises:
        InputError: ``input_value``; the pipeline has no parameter for a value that the request gives, or the request
            has a LoRA.
    """
    extra = _with_length(_own_options(sampling.extra_args, parameters), parameters)
    check_sampling(sampling, _READ, _REASONS)
    fields = dict(_sampling(sampling))
    if twice := [name for name, value in fields.items() if name in extra and extra[name] != value]:
        raise InputError(
            f"{twice[0]} is {quoted(fields[twice[0]])}, and {quoted(extra[twice[0]])} in extra_args",
            code="input_value",
            hint=f"leave one {twice[0]} out",
        )
    given = dict([*_texts(prompt), *_media(prompt, parameters), *fields.items(), *extra.items()])
    unknown = sorted(set(given) - set(parameters))
    if unknown:
        raise InputError(
            f"the pipeline has no parameter {', '.join(unknown)}",
            code="input_value",
            hint="leave it out, or use one of " + ", ".join(sorted(parameters)),
            option=unknown[0],
        )
    check_integer("num_outputs_per_prompt", sampling.num_outputs_per_prompt, minimum=1, maximum=MAX_OUTPUTS)
    if sampling.num_outputs_per_prompt > 1:
        given |= _count(sampling.num_outputs_per_prompt, parameters)
    if "output_type" in parameters:
        given["output_type"] = "latent" if sampling.output_type == "latent" else "np"
    if "generator" in parameters and device is not None:
        given["generator"] = _generator(sampling, device)
    check_magnitudes(given)
    return given


def _own_options(options: Mapping[str, Any], parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``extra_args``; refuse parameters of the call that requests give otherwise, or that only code can set."""
    known = [name for name in parameters if not _is_reserved(name)]
    for name, value in options.items():
        if _is_reserved(name):
            raise unknown_name("extra_args", name, value, known, {})
    return options


def _is_reserved(name: str) -> bool:
    return name in _RESERVED or name.startswith("callback")


def check_magnitudes(arguments: Mapping[str, Any]) -> None:
    """Check the sizes and numbers of the arguments of a call.

    Raises:
        InputError: ``input_value``, ``input_type``, ``input_size``; one of them is out of range.
    """
    for name, value in arguments.items():
        if isinstance(value, float) or name in _FLAGGED or name.endswith("_scale"):
            check_real(name, value, minimum=-MAX_NUMBER, maximum=MAX_NUMBER)
    for name, maximum in {"height": MAX_SIDE, "width": MAX_SIDE, "num_frames": MAX_FRAMES}.items():
        if name in arguments:
            check_integer(name, arguments[name], minimum=1, maximum=maximum)
    if "num_inference_steps" in arguments:
        check_integer("num_inference_steps", arguments["num_inference_steps"], minimum=1, maximum=MAX_STEPS)
    pixels = arguments.get("height", 1) * arguments.get("width", 1) * arguments.get("num_frames", 1)
    if pixels > MAX_PIXELS:
        raise InputError(
            f"height, width and num_frames give {pixels} pixels; at most {MAX_PIXELS} are generated",
            code="input_size",
            hint="give a smaller size, or fewer frames",
        )


def _texts(prompt: Any) -> Iterator[tuple[str, Any]]:
    text = prompt if isinstance(prompt, str) else prompt.get("prompt")
    if text:
        yield "prompt", text
    if not isinstance(prompt, str) and prompt.get("negative_prompt") is not None:
        yield "negative_prompt", prompt["negative_prompt"]


def _media(prompt: Any, parameters: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    media = {} if isinstance(prompt, str) else prompt.get("multi_modal_data") or {}
    for kind, value in media.items():
        values = [_open(kind, item) for item in (value if isinstance(value, list) else [value])]
        name = next((name for name in MEDIA.get(kind, ()) if name in parameters), kind)
        yield name, values[0] if len(values) == 1 else values


def _open(kind: str, value: Any) -> Any:
    """Return a checked image, and anything else as it is; an image may be the path of its file."""
    if kind != "image" or isinstance(value, torch.Tensor):
        return value
    if not isinstance(value, str | Path | bytes):
        return check_image(value, name="image")
    return to_rgb(check_image(value, name="image"), name="image")


def _sampling(sampling: Any) -> Iterator[tuple[str, Any]]:
    for name in _SAMPLING:
        if (value := getattr(sampling, name)) is not None:
            yield name, value
    for name in _FLAGGED:
        if getattr(sampling, f"{name}_provided"):
            yield name, getattr(sampling, name)
    for name, default in _DEFAULTS.items():
        if (value := getattr(sampling, name)) != default:
            yield name, value


def _with_length(extra: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with ``audio_length`` under the name that the pipeline has for it.

    ``/v1/audio/generate`` sends the start and the end of the audio, and with vLLM-Omni 0.32 its length, too.
    """
    given = dict(extra)
    name = next((name for name in LENGTHS if name in parameters), None)
    if name is None or AUDIO_LENGTH in parameters:
        return given
    if name == AUDIO_END:
        length = given.pop(AUDIO_LENGTH, None)
        if length is not None:
            given.setdefault(AUDIO_END, (given.get(AUDIO_START) or 0.0) + length)
        return given
    if given.get(AUDIO_START) == 0.0:
        del given[AUDIO_START]
    end = given.pop(AUDIO_END, None)
    length = given.pop(AUDIO_LENGTH, end)
    return given if length is None else {**given, name: length}


def _count(outputs: int, parameters: Mapping[str, Any]) -> dict[str, int]:
    for name in _COUNTS:
        if name in parameters:
            return {name: outputs}
    raise InputError(
        f"num_outputs_per_prompt is {outputs}; the pipeline returns one output",
        code="input_value",
        hint="send one request for each output",
    )


def _generator(sampling: Any, device: torch.device) -> torch.Generator:
    """Return a generator with the seed of the request, equal on all ranks.

    vLLM-Omni gives every request a seed before it sends it to the ranks.
    """
    if sampling.generator is not None:
        return sampling.generator
    return torch.Generator(device=sampling.generator_device or device).manual_seed(sampling.seed)
