"""Forms of requests: from the values of a page's fields, and back from an error to the field that it is about."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from port_kit.pipeline.request_fields import RequestField, request_fields
from port_kit.port import Port

#: Ranges of fields of ``/v1/videos``, narrower than those of ports.
SERVER_LIMITS: Mapping[str, tuple[float, float]] = {"num_inference_steps": (1, 200), "guidance_scale": (0, 20)}
SIZE = ("width", "height")
#: Places of errors that are no field.
PROMPT, REFERENCES, GENERAL = "prompt", "references", "general"
#: Longest error that is shown, in characters.
MAX_MESSAGE = 1500

_CODE = re.compile(r"^\[(\w+)\]\s*")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ABOUT_REFERENCES = re.compile(r"\b(references?|images?|audios?|input_references?)\b")


def page_fields(port: Port) -> tuple[RequestField, ...]:
    """Return the fields of a port, with the ranges of a server."""
    return tuple(_limited(field) for field in request_fields(port))


def _limited(field: RequestField) -> RequestField:
    if field.name not in SERVER_LIMITS or field.is_option:
        return field
    low, high = SERVER_LIMITS[field.name]
    minimum = low if field.minimum is None else max(low, field.minimum)
    maximum = high if field.maximum is None else min(high, field.maximum)
    return replace(field, minimum=minimum, maximum=maximum)


def form_of(prompt: str, values: Mapping[str, Any], fields: Sequence[RequestField]) -> dict[str, str]:
    """Return the form of a request; values that are the default are left to the model.

    Args:
        prompt: text.
        values: by name of field; None and empty texts stand for the default.
        fields: of the page.
    """
    values = {field.name: _value(field, values.get(field.name)) for field in fields}
    given = {field.name: values[field.name] for field in fields if _is_set(field, values[field.name])}
    if set(SIZE) & set(given):  # a server takes both sides or none
        given |= {name: values[name] for name in SIZE if values.get(name) is not None}
    options = {field.name: given.pop(field.name) for field in fields if field.is_option and field.name in given}
    form = {PROMPT: prompt, **{name: str(value) for name, value in given.items()}}
    if options:
        form["extra_params"] = json.dumps(options)
    return form


def _is_set(field: RequestField, value: Any) -> bool:
    return value is not None and value != "" and value != field.default


def _value(field: RequestField, value: Any) -> Any:
    """Return a value of a page as a request has it; what is no number is left for the server to refuse."""
    if field.kind not in ("int", "float"):
        return value
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value) if field.kind == "float" else int(value)
    # a page's whole numbers may be floats
    return int(value) if isinstance(value, float) and value.is_integer() else value


def place_of(message: str, fields: Sequence[RequestField]) -> str:
    """Return the place that an error of the server is about: the name of a field, or one of the other places."""
    names = {field.name for field in fields}
    code = _CODE.match(message)
    text = _CODE.sub("", message).partition("\n")[0]
    for word in _WORD.findall(text.partition(";")[0]):
        if word in names or word == PROMPT:
            return word
        if word == "size" and SIZE[0] in names:
            return SIZE[0]
        if _ABOUT_REFERENCES.fullmatch(word):
            return REFERENCES
    return REFERENCES if code and code[1] in ("input_count", "input_unreadable", "input_too_short") else GENERAL


def bounded(message: str) -> str:
    """Return an error as it is, or its beginning."""
    text = message.strip() or "the request failed"
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ... ({len(text)} characters)"
