"""Checks on request values. Each raises InputError before any model runs."""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Mapping
from typing import Any

from port_kit.errors import InputError, PortKitError
from port_kit.escape import quoted

#: Longest text that is looked at, in characters; the tokenizer's own limit (in tokens) is checked after it.
MAX_TEXT_CHARACTERS = 8000

#: Depth to which lists and mappings of a request may be nested.
MAX_DEPTH = 4

#: Options of the video encoder (libx264) that a request may set, and their values as text.
CODEC_OPTIONS = {
    "preset": tuple("ultrafast superfast veryfast faster fast medium slow slower veryslow".split()),
    "crf": tuple(map(str, range(52))),
    "threads": tuple(map(str, range(65))),
}


def check_plain(name: str, value: object) -> None:
    """Refuse a value that is not made of numbers, texts, lists and mappings, so that all further checks may compare it.

    Raises:
        InputError: ``input_type``; an array, another object, or lists nested deeper than :data:`MAX_DEPTH`.
    """
    parts: list[tuple[object, int]] = [(value, 0)]
    while parts:
        part, depth = parts.pop()
        if part is None or isinstance(part, (str, bool, numbers.Real)):
            continue
        if isinstance(part, (list, tuple, Mapping)) and depth < MAX_DEPTH:
            inner = [*part, *part.values()] if isinstance(part, Mapping) else part
            parts += [(one, depth + 1) for one in inner]
            continue
        found = f"nested deeper than {MAX_DEPTH} levels" if depth == MAX_DEPTH else f"of the type {type(part).__name__}"
        raise InputError(
            f"{name} has a value {found}: {quoted(part)}; numbers, texts, lists and mappings are taken",
            code="input_type",
            hint=f"correct {name}",
        )


def is_equal(first: object, second: object) -> bool:
    """Return True if two values are equal; arrays of several elements never are."""
    try:
        return bool(first == second)
    except (ValueError, RuntimeError, TypeError):
        return False


def check_text(name: str, value: object, *, required: bool = False) -> str:
    """Return ``value`` as it is if it is text of an acceptable length.

    Args:
        name: what the value is called in the message.
        required: whether blank text is an error.

    Raises:
        InputError: not a string, blank though required, longer than :data:`MAX_TEXT_CHARACTERS`, or with halves of
            surrogate pairs, which no encoding has.
    """
    if not isinstance(value, str):
        raise InputError(
            f"{name} is {type(value).__name__}; text is required", code="input_type", hint=f"give {name} as a string"
        )
    if required and not value.strip():
        raise InputError(f"{name} is empty", code="input_missing", hint=f"describe the scene in {name}")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise InputError(
            f"{name} has {len(value)} characters; at most {MAX_TEXT_CHARACTERS} are taken",
            code="input_too_long",
            hint="shorten it: whatever lies beyond the text encoder's tokens would never be seen by the model",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} has {quoted(value[error.start])} at {error.start}, which is half of a character",
            code="input_value",
            hint="decode the text as it was encoded",
        ) from error
    return value


def check_integer(name: str, value: object, *, minimum: int, maximum: int | None = None) -> int:
    """Return ``value`` as an int within ``minimum``..``maximum``; raises InputError otherwise (booleans too)."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(f"{name} is {quoted(value)}; a whole number is required", code="input_type") from error
    if number < minimum or (maximum is not None and number > maximum):
        wanted = f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"
        raise InputError(
            f"{name} is {quoted(number)}; {wanted} is required", code="input_value", hint=f"correct {name}"
        )
    return number


def check_real(
    name: str, value: object, *, minimum: float = -math.inf, maximum: float = math.inf, positive: bool = False
) -> float:
    """Return ``value`` as a finite float within ``minimum``..``maximum``; raises InputError otherwise.

    Args:
        name: what the value is called in the message.
        value: the value; booleans are refused.
        minimum, maximum: the range.
        positive: zero is refused, too.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"{name} is {quoted(value)}; a number is required", code="input_type")
    number = operator.index(value) if isinstance(value, numbers.Integral) else float(value)
    if not minimum <= number <= maximum or not abs(number) <= sys.float_info.max or (positive and number <= 0):
        lowest = "more than zero" if positive and minimum <= 0 else f"{minimum:g} or more"
        limits = [lowest] if positive or minimum > -math.inf else []
        limits += [f"at most {maximum:g}"] if maximum < math.inf else []
        wanted = " and ".join(limits) if limits else "a finite number"
        raise InputError(f"{name} is {quoted(value)}; {wanted} is required", code="input_value", hint=f"correct {name}")
    return float(number)


def check_size(height: object, width: object, *, multiple: int, maximum: int, area: int) -> tuple[int, int]:
    """Return ``(height, width)`` in pixels, each a positive multiple of ``multiple`` up to ``maximum``.

    Their product is at most ``area``; raises InputError otherwise.
    """
    sides = {}
    for name, value in (("height", height), ("width", width)):
        side = check_integer(name, value, minimum=multiple, maximum=maximum)
        if side % multiple:
            low = side - side % multiple
            raise InputError(
                f"{name} is {side}; a multiple of {multiple} is required",
                code="input_size",
                hint=f"use {low} or {low + multiple}",
            )
        sides[name] = side
    if sides["height"] * sides["width"] > area:
        raise InputError(
            f"height and width are {sides['height']} and {sides['width']}; at most {area} pixels are generated",
            code="input_size",
            hint="give a smaller height or width",
        )
    return sides["height"], sides["width"]


def request_seed(sampling: Any, default: int, *, maximum: int) -> int:
    """Return the seed of a request, that of its generator, or the default.

    ``/v1/audio/generate`` gives a generator in place of a seed.

    Raises:
        InputError: the seed is not an integer in 0..``maximum``.
    """
    seed = sampling.seed
    if seed is None and sampling.generator is not None:
        seed = sampling.generator.initial_seed()
    return check_integer("seed", default if seed is None else seed, minimum=0, maximum=maximum)


def check_unused(given: Mapping[str, object], unused: Mapping[str, str]) -> None:
    """Refuse a value that servers offer a field for and that this model would not heed.

    Args:
        given: values by name; None and False ask for nothing.
        unused: names that the model does not heed, with what it does instead.

    Raises:
        InputError: one of them is given.
    """
    for name, instead in unused.items():
        if given.get(name) not in (None, False):
            raise InputError(
                f"{name} is {quoted(given[name])}; {instead}", code="input_value", hint=f"leave {name} out", option=name
            )


def check_codec_options(options: object) -> None:
    """Check what a server hands to the video encoder after the model has run; raises InputError before that.

    Args:
        options: a mapping with keys of :data:`CODEC_OPTIONS`; None is none.
    """
    if options is None:
        return
    if not isinstance(options, Mapping):
        raise InputError(f"video_codec_options is {type(options).__name__}; a mapping is required", code="input_type")
    for name, value in options.items():
        if value not in CODEC_OPTIONS.get(name, ()):
            known = ", ".join(CODEC_OPTIONS)
            raise InputError(
                f"video_codec_options has {quoted(name)}: {quoted(value)}; {known} are taken, as text",
                code="input_value",
                hint="leave it out: the default is quick and visually lossless",
            )


def check_cached_outputs(outputs: int, cache_backend: str | None) -> None:
    """Refuse several videos a request where blocks are cached: the cache remembers one video's from step to step.

    Raises:
        InputError: with what to do.
    """
    if outputs > 1 and cache_backend not in (None, "none"):
        raise InputError(
            f"num_outputs_per_prompt is {outputs}; with cache_backend={cache_backend} a request makes one video",
            code="input_value",
            hint="send one request for each video, or start the engine without cache_backend",
        )


def to_client_error(error: PortKitError) -> Exception:
    """Return a request's error as one that vLLM-Omni answers with 400."""
    from vllm_omni.errors import OmniClientError

    return OmniClientError(str(error))


def media_mapping(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``multi_modal_data`` of a prompt, empty if it has none; raises InputError if it is not a mapping."""
    media = fields.get("multi_modal_data")
    if media is None:
        return {}
    if not isinstance(media, Mapping):
        raise InputError(f"multi_modal_data is {type(media).__name__}; expected a mapping", code="input_type")
    return media


def as_list(value: object) -> list[Any]:
    """Return one reference or several as a list; None is no reference."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) and not _is_waveform(value) else [value]


def first_frame_of(guide: object, frames: int) -> Any:
    """Return the image of one of vLLM-Omni's timeline guides for a model that accepts images at the first frame only.

    Args:
        guide: mapping with ``frame_index`` and one or more of ``image``, ``video`` and ``audio``.
        frames: of the output; a negative ``frame_index`` counts back from its end.

    Raises:
        InputError: it is at another frame, or is not an image alone.
    """
    fields = guide if isinstance(guide, Mapping) else {}
    index = check_integer("frame_index", fields.get("frame_index"), minimum=-frames, maximum=frames - 1)
    if index % frames:
        raise InputError(
            f"a timeline guide has frame_index {index}; this model accepts an image at the first frame, 0, only",
            code="input_value",
            hint="set frame_index to 0, or leave the guide out",
        )
    kinds = [kind for kind in ("image", "video", "audio") if fields.get(kind) is not None]
    if kinds != ["image"]:
        raise InputError(
            f"a timeline guide has {' and '.join(kinds) or 'no media'}; this model accepts an image at the first frame",
            code="input_value",
            hint="give the guide an image only",
        )
    return fields["image"]


def _is_waveform(value: list[Any] | tuple[Any, ...]) -> bool:
    """Return True if this is one ``(samples, rate)`` pair and not two references."""
    if len(value) != 2 or isinstance(value[1], bool) or not isinstance(value[1], numbers.Real):
        return False
    return hasattr(value[0], "__len__") and not isinstance(value[0], (str, bytes))
