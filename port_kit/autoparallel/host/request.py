"""From a request of vLLM-Omni to the arguments of a diffusers pipeline's call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from port_kit.errors import InputError
from port_kit.pipeline.prompt_request import AUDIO_END, AUDIO_LENGTH, AUDIO_START

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
_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


def call_arguments(prompt: Any, sampling: Any, parameters: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the arguments of the call.

    Args:
        prompt: text, or a dict with ``prompt``, ``negative_prompt`` and ``multi_modal_data``.
        sampling: ``OmniDiffusionSamplingParams``; ``extra_args`` are arguments of the call.
        parameters: parameters of the pipeline's call.
        device: the rank's device.

    Raises:
        InputError: ``input_value``; the pipeline has no parameter for a value that the request gives, or the request
            has a LoRA.
    """
    if sampling.lora_request is not None:
        raise InputError(
            "hosted pipelines apply no LoRA of a request", code="input_value", hint="leave lora_request out"
        )
    extra = _with_length(sampling.extra_args, parameters)
    given = dict([*_texts(prompt), *_media(prompt, parameters), *_sampling(sampling), *extra.items()])
    unknown = sorted(set(given) - set(parameters))
    if unknown:
        raise InputError(
            f"the pipeline has no parameter {', '.join(unknown)}",
            code="input_value",
            hint="leave it out, or use one of " + ", ".join(sorted(parameters)),
            option=unknown[0],
        )
    if sampling.num_outputs_per_prompt > 1:
        given |= _count(sampling.num_outputs_per_prompt, parameters)
    if "output_type" in parameters:
        given["output_type"] = "latent" if sampling.output_type == "latent" else "np"
    if "generator" in parameters:
        given["generator"] = _generator(sampling, device)
    return given


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
    """Return an image for the path of its file, and anything else as it is."""
    if kind != "image" or not isinstance(value, str | Path):
        return value
    try:
        return Image.open(value).convert("RGB")
    except OSError as error:
        raise InputError(f"{value}: {error}", code="input_unreadable", hint="give an image file") from error


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
    if isinstance(sampling.generator, torch.Generator):
        return sampling.generator
    return torch.Generator(device=sampling.generator_device or device).manual_seed(sampling.seed)
