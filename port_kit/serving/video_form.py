"""The form of ``/v1/videos``: checked by name and value, its references by content, and passed on in one form."""

from __future__ import annotations

import asyncio
import difflib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from port_kit.escape import quoted
from port_kit.references import check_audio, image_suffix
from port_kit.serving.asgi import Refusal
from port_kit.serving.fetch import Fetcher
from port_kit.serving.forms import Form, Upload
from port_kit.serving.limits import Limits
from port_kit.serving.loras import resolve_lora
from port_kit.serving.pictures import check_picture
from port_kit.serving.references import content_of
from port_kit.serving.served import Served
from port_kit.serving.strict_json import parse_json

INTEGERS = ("width", "height", "num_frames", "num_inference_steps", "num_outputs_per_prompt", "seed")
NUMBERS = ("fps", "guidance_scale")
TEXTS = (
    "prompt",
    "negative_prompt",
    "model",
    "user",
    "size",
    "seconds",
    "lora",
    "extra_params",
)
#: Fields of vLLM-Omni's form that are options of some models; other models ignore them.
MODEL_OPTIONS = ("flow_shift", "true_cfg_scale", "generate_sound")
#: Fields that no port has, with the value that changes nothing: vLLM-Omni's nodes for ComfyUI always send them.
NEUTRAL = {"n": "1", "true_cfg_scale": "1", "vae_use_slicing": "false", "vae_use_tiling": "false"}
GUIDE_FIELDS = ("timeline_guides", "guide_files")
FILE_FIELDS = ("input_reference", "input_references", "guide_files")
#: Kinds of references.
KINDS = ("image", "audio")

#: Largest reference in bytes, by kind, as in vLLM-Omni's server.
MAX_BYTES = {"image": 30 * 2**20, "audio": 15 * 2**20}
#: Length of a video; models make less.
MAX_SECONDS = 3600.0
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)


async def check_video_form(form: Form, served: Served, limits: Limits) -> dict[str, Any]:
    """Check a form and bring it to the one form in which vLLM-Omni's server receives it.

    References become files: images before audios, each in the order of the request.

    Returns:
        The settings that the record of a job shows.

    Raises:
        Refusal: a name or a value is not valid; InputError: a reference is not.
    """
    _check_names(form, served)
    numbers = _check_values(form)
    _set_size(form, numbers)
    _set_length(form, numbers, served)
    _check_options(form, served)
    _json(form, "timeline_guides", (dict, list))
    if "lora" in form.fields:
        form.fields["lora"] = json.dumps(resolve_lora(parse_json(form.fields["lora"], "lora"), limits))
    await _set_references(form, served, limits)
    given: dict[str, Any] = {name: numbers[name] for name in ("seed", "num_inference_steps") if name in numbers}
    return {**dict(served.settings), **given}


# -- names ----------------------------------------------------------------------------------------------------------


def _check_names(form: Form, served: Served) -> None:
    port = served.port
    options = served.options or ()
    fields = [*INTEGERS, *NUMBERS, *TEXTS, *(name for name in MODEL_OPTIONS if port is None or name in options)]
    if port is None or port.references:
        fields += FILE_FIELDS[:2]
        fields += [f"{kind}_reference" for kind in (KINDS if port is None else port.references)]
    if port is None or port.timeline_guides:
        fields += GUIDE_FIELDS
    _drop_neutral(form, fields)
    for name in [*form.fields, *(upload.field for upload in form.uploads)]:
        if name not in fields:
            raise Refusal(
                400, f"[input_value] the form has the unknown field {quoted(name)}{_near(name, fields, options)}"
            )
    for upload in form.uploads:
        if upload.field not in FILE_FIELDS:
            raise Refusal(400, f"[input_type] {quoted(upload.field)} is a file; a value is required")
    for name, value in form.fields.items():
        if name in FILE_FIELDS:
            raise Refusal(400, f"[input_type] {name} is a value; a file is required")
        if not value:
            raise Refusal(400, f"[input_value] {name} is empty\nhint: leave {name} out for the default")
    if not form.fields.get("prompt", "").strip():
        raise Refusal(400, "[input_missing] prompt is missing or blank\nhint: describe the scene in prompt")


def _drop_neutral(form: Form, fields: Iterable[str]) -> None:
    for name, neutral in NEUTRAL.items():
        if name in fields or name not in form.fields:
            continue
        value = form.fields.pop(name)
        if value.lower().removesuffix(".0") != neutral:
            raise Refusal(
                400,
                f"[input_value] {name} is {quoted(value)}; this model accepts {neutral} only\nhint: leave {name} out",
            )


def _near(name: str, fields: Iterable[str], options: Iterable[str]) -> str:
    if name in options:
        return f'\nhint: give it in extra_params, a JSON object: extra_params={{"{name}": ...}}'
    near = difflib.get_close_matches(name, [*fields, *options], n=1)
    return f"\nhint: did you mean {quoted(near[0])}?" if near else f"\nhint: known are {', '.join(fields)}"


def _check_options(form: Form, served: Served) -> None:
    """Check the names of ``extra_params``; their values are checked by the port."""
    given = _json(form, "extra_params", dict)
    if given is None or served.options is None:
        return
    for name in given:
        if name not in served.options:
            near = difflib.get_close_matches(name[:80], served.options, n=1)
            hint = f"did you mean {quoted(near[0])}?" if near else f"known are {', '.join(served.options)}"
            if name in (*INTEGERS, *NUMBERS, *TEXTS):
                hint = f"{name} is a field of the form"
            raise Refusal(400, f"[input_value] extra_params has the unknown option {quoted(name)}\nhint: {hint}")


# -- values ---------------------------------------------------------------------------------------------------------


def _check_values(form: Form) -> dict[str, Any]:
    """Return the numbers of the form."""
    numbers: dict[str, Any] = {}
    for names, kind, wanted in ((INTEGERS, int, "a whole number"), (NUMBERS, float, "a finite number")):
        for name in names:
            if name in form.fields:
                numbers[name] = _number(name, form.fields[name], kind, wanted)
    if numbers.get("num_outputs_per_prompt", 1) != 1:
        raise Refusal(
            400,
            f"[input_value] num_outputs_per_prompt is {numbers['num_outputs_per_prompt']}; a request gives 1 video"
            "\nhint: send one request for each video, with seeds of your choice",
        )
    return numbers


def _number(name: str, text: str, kind: Callable[[str], Any], wanted: str) -> Any:
    try:
        number = kind(text) if len(text) < 32 and text.isascii() and "_" not in text else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise Refusal(400, f"[input_type] {name} is {quoted(text)}; {wanted} is required")
    return number


def _set_size(form: Form, numbers: dict[str, Any]) -> None:
    size = form.fields.pop("size", None)
    given = [name for name in ("width", "height") if name in numbers]
    if size is not None:
        match = _SIZE.fullmatch(size)
        if match is None or given or "0" in match.groups():
            raise Refusal(
                400, f"[input_size] size is {quoted(size)}; WIDTHxHEIGHT without width and height is required"
            )
        form.fields["width"], form.fields["height"] = match.groups()
    elif len(given) == 1:
        raise Refusal(400, f"[input_missing] only {given[0]} is given\nhint: give width and height, or neither")


def _set_length(form: Form, numbers: dict[str, Any], served: Served) -> None:
    """Check the length of the video, and give it as a number of frames to a model that makes several lengths."""
    seconds = form.fields.pop("seconds", None)
    if seconds is not None and "num_frames" in numbers:
        raise Refusal(400, "[input_value] seconds and num_frames are given; one of them is required")
    if served.fps and numbers.get("fps", served.fps) != served.fps:
        raise Refusal(
            400, f"[input_value] fps is {numbers['fps']:g}; this model makes {served.fps:g} frames per second"
        )
    wanted = None if seconds is None else _number("seconds", seconds, float, "a number of seconds")
    if served.frames is None:
        _choose_frames(form, numbers, wanted, served)
        return
    length = served.frames / served.fps
    if wanted is not None and abs(wanted - length) > 0.5:
        raise Refusal(400, f"[input_value] seconds is {seconds}; this model makes videos of {length:.2f} s")
    if numbers.get("num_frames", served.frames) != served.frames:
        raise Refusal(
            400, f"[input_value] num_frames is {numbers['num_frames']}; this model makes {served.frames} frames"
        )


def _choose_frames(form: Form, numbers: dict[str, Any], wanted: float | None, served: Served) -> None:
    """Set the number of frames nearest to ``wanted`` seconds; refuse 1, for which vLLM-Omni makes the default."""
    step = served.frame_step
    if wanted is not None and not 0 < wanted <= MAX_SECONDS:
        raise Refusal(400, f"[input_value] seconds is {wanted:g}; more than 0 and at most {MAX_SECONDS:g} is required")
    if step is not None and numbers.get("num_frames") == 1:
        raise Refusal(400, f"[input_value] num_frames is 1; {1 + step}, or more in steps of {step}, is required")
    if wanted is not None and served.fps:
        frames = wanted * served.fps
        nearest = max(1, round(frames)) if step is None else 1 + step * max(1, round((frames - 1) / step))
        form.fields["num_frames"] = str(nearest)


def _json(form: Form, name: str, kind: type | tuple[type, ...]) -> Any:
    text = form.fields.get(name)
    if text is None:
        return None
    value = parse_json(text, name)
    if not isinstance(value, kind):
        raise Refusal(400, f"[input_type] {name} is {type(value).__name__} in JSON; an object is required")
    return value


# -- references -----------------------------------------------------------------------------------------------------


async def _set_references(form: Form, served: Served, limits: Limits) -> None:
    """Replace all references of the form by checked files."""
    urls = {kind: await asyncio.to_thread(_urls, form, kind) for kind in KINDS}
    files = [upload for upload in form.uploads if upload.field != "guide_files"]
    count = len(files) + sum(len(found) for found in urls.values())
    if count > served.max_references and served.port is not None:
        raise Refusal(400, f"[input_count] {count} references; this model takes at most {served.max_references}")
    kinds = KINDS if served.port is None else served.port.references
    found: dict[str, list[Upload]] = {"image": [], "audio": []}
    for upload in files:
        await _add(found, await asyncio.to_thread(upload.file.read), kinds)
        upload.file.close()
    fetcher = Fetcher(limits, limits.max_body)
    for kind, listed in urls.items():
        for url in listed:
            content = await content_of(url, fetcher)
            await _add(found, content, (kind,))
    guides = [upload for upload in form.uploads if upload.field == "guide_files"]
    for number, upload in enumerate(guides):
        await check_picture(upload.file, name=f"guide_files[{number}]")
        upload.file.seek(0)
    field = "input_references" if served.max_references > 1 else "input_reference"
    form.uploads = guides + [upload for kind in KINDS for upload in found[kind]]
    for upload in form.uploads[len(guides) :]:
        upload.field = field


def _urls(form: Form, kind: str) -> list[str]:
    """Take the URLs of ``image_reference`` or ``audio_reference`` out of the form."""
    name, key = f"{kind}_reference", f"{kind}_url"
    given = _json(form, name, (dict, list))
    form.fields.pop(name, None)
    listed = given if isinstance(given, list) else [] if given is None else [given]
    for entry in listed:
        if not isinstance(entry, dict) or list(entry) != [key] or not isinstance(entry[key], str):
            raise Refusal(400, f'[input_type] {name} has an entry that is not {{"{key}": URL}}')
    return [entry[key] for entry in listed]


async def _add(found: dict[str, list[Upload]], content: bytes, wanted: Sequence[str]) -> None:
    """Check a reference by its content, and add it as a file that vLLM-Omni's server recognizes by its name."""
    kind, suffix = _kind_of(content)
    name = f"reference {kind} {len(found[kind]) + 1}"
    if kind not in wanted:
        raise Refusal(400, f"[input_value] {name} is no {' or '.join(wanted)} file that this model reads")
    if len(content) > MAX_BYTES[kind]:
        raise Refusal(
            400, f"[input_size] {name} has {len(content)} bytes; at most {MAX_BYTES[kind]} are taken of {kind}"
        )
    if kind == "image":
        await check_picture(content, name=name)
    else:
        await asyncio.to_thread(check_audio, content, name=name)
    found[kind].append(Upload("", f"{kind}_{len(found[kind]) + 1}{suffix}", io.BytesIO(content)))


def _kind_of(content: bytes) -> tuple[str, str]:
    """Return the kind of a file, and the suffix for vLLM-Omni's server.

    The suffix of audio only says that it is audio: the port reads the container from the content.
    """
    suffix = image_suffix(content)
    return ("audio", ".wav") if suffix is None else ("image", suffix)
