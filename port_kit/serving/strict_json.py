"""JSON of requests: no duplicate names, only finite numbers of usual length, valid text, and few values."""

from __future__ import annotations

import json
import math
from typing import Any

from port_kit.escape import quoted, reason_of, shortened
from port_kit.serving.asgi import Refusal

#: Values of a document, counted before it is parsed: an empty list takes 3 bytes of a document and 56 of memory.
MAX_VALUES = 10_000
#: Digits of a number.
MAX_DIGITS = 32


def parse_json(text: str | bytes, name: str) -> Any:
    """Return the value of a JSON document.

    Args:
        text: the document.
        name: of the field, for messages.

    Raises:
        Refusal: status 400.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        if sum(map(text.count, "[{,")) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_number
        )
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"[input_type] {name} is no valid JSON: {reason_of(error)}") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {quoted(name)} is repeated")
        found[name] = value
    return found


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if len(text) > MAX_DIGITS or not math.isfinite(number):
        raise ValueError(f"the number {shortened(text)} is out of range")
    return number
