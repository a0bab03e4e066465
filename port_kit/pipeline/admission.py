"""Exact names of requests: entries of ``extra_args``, sampling parameters, and fields of the prompt.

Nothing that a request sets is ignored. A name that a port does not read is an error, whoever sent it, except for the
values that vLLM-Omni's engine and servers fill in for every request.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from port_kit.errors import InputError
from port_kit.escape import quoted, shortened
from port_kit.pipeline.inputs import check_plain, is_equal
from port_kit.port import Port

#: Sampling parameters that the request loop reads, beside ``extra_args``.
READ = frozenset(
    "seed generator num_outputs_per_prompt num_inference_steps guidance_scale height width num_frames fps frame_rate "
    "lora_request lora_scale extra_args".split()
)
#: Sampling parameters that are objects or arrays, with checks of their own.
_OBJECTS = frozenset("generator generator_device lora_request extra_args latents sigmas".split())
#: Sampling parameters that vLLM-Omni derives, or that do not concern the output.
DERIVED = frozenset(
    "guidance_scale_provided guidance_scale_2_provided do_classifier_free_guidance step_index height_not_provided "
    "width_not_provided emit_request_lifecycle streaming_output_ack".split()
)
#: Fields of prompts that all ports read, or that vLLM-Omni adds to every request.
PROMPT_FIELDS = ("prompt", "negative_prompt", "multi_modal_data", "modalities")
#: Options that are numbers, and have no effect on the size of values.
_LENGTHS = ("duration",)

#: Options that servers of vLLM-Omni offer for other models, with the reason why a port does not read them.
OTHER_MODELS = {
    "aspect_ratio": "height and width decide the size",
    "boundary_ratio": "this model has one transformer",
    "duration": "this model does not make outputs of a given duration",
    "enable_frame_interpolation": "this model interpolates no frames",
    "generate_sound": "this model does not make sound on demand",
    "generator": "the seed decides the noise: set seed",
    "guidance_scale_2": "this model has one transformer",
    "latents": "the seed decides the noise",
    "output_type": "outputs have one form",
    "quality": "num_inference_steps alone decides the quality",
    "short_edge": "height and width alone decide the size",
    "sound_duration": "this model does not make sound of a given duration",
    "start_time_seconds": "this model reads no reference video",
    "true_cfg_scale": "it guides other models",
}


def admit(
    prompt: Any,
    sampling: Any,
    port: Port,
    *,
    fps: float,
    prompt_fields: Iterable[str] = (),
    tensors: Collection[str] = (),
    reasons: Mapping[str, str] | None = None,
) -> None:
    """Check the names that a request sets, and that their values can be compared.

    Args:
        prompt: text, or a mapping.
        sampling: ``OmniDiffusionSamplingParams``.
        port: its options are the accepted entries of ``extra_args``.
        fps: frames per second of the output; 0 if it has no frames.
        prompt_fields: names of the prompt that the pipeline reads beside :data:`PROMPT_FIELDS`.
        tensors: names of options that may be tensors.
        reasons: why names that servers offer are not read, on top of :data:`OTHER_MODELS`.

    Raises:
        InputError: ``input_value``; the message has the name, and the hint the nearest accepted one. ``input_type``; a
            value is an array or another object.
    """
    why = OTHER_MODELS | dict(reasons or {})
    known = port.option_names or ()
    options = {} if sampling.extra_args is None else sampling.extra_args
    if not isinstance(options, Mapping):
        raise InputError(f"extra_args is {type(options).__name__}; expected a mapping", code="input_type")
    fields = [field.name for field in dataclasses.fields(sampling)]
    for name, value in options.items():
        if name not in known:
            raise unknown_name("extra_args", name, value, known, why, fields=READ & set(fields))
        if name not in tensors:
            check_plain(name, value)
    check_sampling(sampling, READ, why)
    for name in ("fps", "frame_rate"):
        if (value := getattr(sampling, name)) not in (None, fps):
            made = f"makes {fps:g} frames per second" if fps else "makes no frames"
            message = f"{name} is {quoted(value)}; this model {made}"
            raise InputError(message, code="input_value", hint=f"leave {name} out")
    check_generator(sampling, takes=port.output_type == "audio")
    if isinstance(prompt, Mapping):
        _check_prompt(prompt, sampling, (*PROMPT_FIELDS, *prompt_fields), why)


def magnitudes(sampling: Any, port: Port) -> tuple[str, ...]:
    """Return the names of what a request sets that may make an output overflow."""
    given = dict(sampling.extra_args or {})
    own = [name for name, kind in port.request_options.items() if kind == "float"]
    candidates = [name for name in (*own, *port.more_options) if name not in _LENGTHS]
    names = [name for name in candidates if given.get(name) is not None and not isinstance(given[name], bool)]
    if sampling.lora_request is not None:
        names.append("lora_request")
    if sampling.guidance_scale_provided:
        names.append("guidance_scale")
    return tuple(names)


def unknown_name(
    owner: str,
    name: object,
    value: object,
    known: Iterable[str],
    reasons: Mapping[str, str],
    fields: Iterable[str] = (),
) -> InputError:
    """Return the error of a name that a request may not set.

    Args:
        owner: what has the name.
        name, value: the name and its value.
        known: accepted names.
        reasons: of names that are not accepted.
        fields: names that are accepted as sampling parameters.
    """
    text, choices = shortened(name) if isinstance(name, str) else quoted(name), sorted(known)
    if text in reasons:
        message, hint = f"{text} is {quoted(value)}; {reasons[text]}", f"leave {text} out"
    else:
        message = f"unknown option {quoted(name)} in {owner}"
        near = difflib.get_close_matches(text.lower(), choices, n=1, cutoff=0.6)
        hint = (
            f"did you mean {quoted(near[0])}?"
            if near
            else f"use one of {', '.join(choices)}"
            if choices
            else "remove it"
        )
    if text in fields:
        message, hint = f"{text} is in {owner}; it is a parameter of its own", f"set {text} itself"
    return InputError(message, code="input_value", hint=hint, option=text)


def check_sampling(sampling: Any, read: Collection[str], reasons: Mapping[str, str]) -> None:
    """Refuse sampling parameters that are set and are not read.

    Args:
        sampling: ``OmniDiffusionSamplingParams``.
        read: names of those that are read.
        reasons: why others are not.

    Raises:
        InputError: ``input_value``; ``input_type`` for a value that is an array or another object.
    """
    plain = {*read, *DERIVED} - _OBJECTS
    for field in dataclasses.fields(sampling):
        if field.name in plain:
            check_plain(field.name, getattr(sampling, field.name))
    scale = sampling.guidance_scale_2  # the engine sets it to guidance_scale if a request has none
    is_copy = is_equal(scale, sampling.guidance_scale) and not sampling.guidance_scale_2_provided
    for field in dataclasses.fields(sampling):
        if field.name in read or field.name in DERIVED or (field.name == "guidance_scale_2" and is_copy):
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        value = getattr(sampling, field.name)
        if type(value) is not type(default) or value != default:
            raise unknown_name("the sampling parameters", field.name, value, read, reasons)


def check_generator(sampling: Any, *, takes: bool) -> None:
    """Refuse a generator that is not the fresh generator of the request's seed.

    Args:
        sampling: ``OmniDiffusionSamplingParams``.
        takes: a generator may stand for its seed, as in requests to ``/v1/audio/generate``.

    Raises:
        InputError: ``input_value``.
    """
    generator, seed = sampling.generator, sampling.seed
    if generator is None:
        return
    initial = getattr(generator, "initial_seed", None)
    if initial is not None and (seed == initial() or (takes and seed is None)):
        fresh = type(generator)(generator.device).manual_seed(initial())
        if bool((fresh.get_state() == generator.get_state()).all()):
            return
    raise InputError(
        "generator is given; the seed decides the noise", code="input_value", hint="set seed", option="generator"
    )


def _check_prompt(prompt: Mapping[str, Any], sampling: Any, known: Iterable[str], reasons: Mapping[str, str]) -> None:
    """Check the fields of a prompt; ``/v1/images/generations`` repeats the size there."""
    size = {"height": sampling.height, "width": sampling.width}
    repeated = {**size, "mm_processor_kwargs": {f"target_{name[0]}": side for name, side in size.items()}}
    for name, value in prompt.items():
        if value is None or name in known or (name in repeated and is_equal(value, repeated[name])):
            continue
        raise unknown_name("the prompt", name, value, known, reasons)
